"""What a user can get wrong: one message that says what to do, the documented exit code, and nothing half-written.

Most cases call the command line's ``main`` in this process; what is about processes, signals and disks runs it as one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.checkpoint import CONFIG_KEY, CheckpointError, load, reference_state
from tarflow.cli.main import main
from tarflow.config import Config, ConfigError
from tarflow.model import TarFlow
from tarflow.runtime.bundle import MANIFEST, WEIGHTS, Bundle
from tarflow.runtime.files import replacing, replacing_folder
from tarflow.runtime.flow import Flow
from tarflow.runtime.image import write_png

Exported = Callable[..., Path]
OK, FAILED, USAGE, MACHINE, ARTIFACT, INTERRUPTED = 0, 1, 2, 3, 4, 130
TARFLOW = [sys.executable, "-m", "tarflow.cli.main"]
GPU = "CUDAExecutionProvider"


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> str:
        """Check how the command failed, and return its message."""
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        start = self.err.find("tarflow: error: ")
        assert start == 0 or self.err[start - 1] == "\n", self.err
        message = self.err[start:]
        for word in words:
            assert word in message
        return message


Door = Callable[..., Outcome]


@pytest.fixture
def tarflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    """tarflow("generate", ...) in this process, in a folder of its own, in which a failure may change nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tarflow", *map(str, args)])
        before, terminate = contents(tmp_path), signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, terminate)
        captured = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        if code:
            assert contents(tmp_path) == before, "a failure left something behind, or changed it"
        return Outcome(code, captured.out, captured.err)

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and what files hold."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def cond(bundle: Exported) -> Path:
    """Five classes, trained with Gaussian noise."""
    return bundle("cond", "fp32")


@pytest.fixture
def uncond(bundle: Exported) -> Path:
    return bundle("uncond", "fp32")


def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the command begins its work."""
    monkeypatch.setattr(Flow, "sample", lambda *_, **__: pytest.fail("sampled before the request was checked"))


def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.export.pipeline.trace", lambda *_: pytest.fail("began the export"))


def small_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model of a billion blocks would be begun: it would take the machine's memory."""

    def build(config: Config) -> TarFlow:
        if config.blocks * config.layers > 1000:
            pytest.fail(f"made a model of {config.blocks} blocks x {config.layers} layers")
        return TarFlow(config)

    monkeypatch.setattr("tarflow.checkpoint.TarFlow", build)


class Bomb:
    """Unpickling this makes a folder: what a malicious file would do, made visible."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# --- the command line itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--colour", "red"],
        ["generate", "--n", "many"],
        ["generate", "--n", "1.5"],
        ["generate", "--seed", ""],
        ["generate", "--guidance", "strong"],
        ["generate", "one", "two"],
        ["export", "--patch-size", "two"],
        ["likelihood"],
        ["verify"],
        ["dance"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_does_not_parse_is_a_usage_error(args: list[str], tarflow: Door) -> None:
    found = tarflow(*args)
    assert found.code == USAGE
    assert found.out == ""
    assert found.err.startswith("Usage: ")
    assert "Traceback" not in found.err


def test_the_real_command_says_one_sentence_and_fails(cond: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*TARFLOW, "generate", cond, "--labels", "7"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    message = Outcome(done.returncode, done.stdout, done.stderr).refused(USAGE, "label 7", "0 to 4")
    assert message.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nothing-here", "x" * 300, "x/" * 3000], ids=["absent", "long name", "long path"])
@pytest.mark.parametrize("command", ["generate", "inspect", "verify", "likelihood", "export"])
def test_a_path_to_nothing_is_refused(command: str, name: str, tarflow: Door) -> None:
    rest = ["images"] if command == "likelihood" else []
    found = tarflow(command, name, *rest)
    found.refused(found.code)
    assert found.code in (USAGE, MACHINE, ARTIFACT)


# --- generate: numbers and words ---------------------------------------------------------------------------------

REFUSED = [
    ("--labels 5", "label 5 0 to 4 -1"),
    ("--labels 0-9", "out of range"),
    ("--labels 1,2,70", "label 70"),
    ("--labels one", "a class (3)"),
    ("--labels 1.5", "a class (3)"),
    ("--labels 1,,2", "a class (3)"),
    ("--labels 3-", "a class (3)"),
    ("--labels 4-0", "smaller class first"),
    ("--labels 1;2", "a class (3)"),
    ("--labels 0-99999999", "range"),
    ("--labels 0-99999999999999999999", "label"),
    ("--labels 9223372036854775808", "label"),
    ("--labels 99999999999999999999999999", "label"),
    ("--labels -99999999999999999999999999", "label"),
    ("--labels y.npy", "y.npy"),
    ("--labels=", "a class (3)"),
    ("--n 0", "1 or more"),
    ("--n -3", "1 or more"),
    ("--n 99999999999999999999", "n"),
    ("--batch-size 0", "1 or more"),
    ("--batch-size -1", "1 or more"),
    ("--seed -1", "seed -1 2^64"),
    ("--seed 18446744073709551616", "seed 2^64"),
    ("--first-sample -1", "sample index -1"),
    ("--first-sample 18446744073709551615 --n 2", "sample index"),
    ("--guidance -1 --labels 1", "guidance scale"),
    ("--guidance nan --labels 1", "guidance scale"),
    ("--guidance inf --labels 1", "guidance scale"),
    ("--guidance 1", "labels does nothing"),
    ("--guidance 1 --labels -1", "labels does nothing"),
    ("--guidance 1 --labels 1 --guide c", "expected ab"),
    ("--guidance 1 --labels 1 --guide ba", "expected ab"),
    ("--guidance 1 --labels 1 --guide=", "expected ab"),
    ("--attention-temperature 0", "attention temperature positive"),
    ("--attention-temperature -0.5", "attention temperature"),
    ("--attention-temperature nan", "attention temperature"),
    ("--attention-temperature inf", "attention temperature"),
    ("--denoise --denoise-strength -1", "denoising strength"),
    ("--denoise --denoise-strength nan", "denoising strength"),
    ("--threads 0", "threads"),
    ("--threads -2", "threads"),
    ("--provider tpu", "auto cpu cuda"),
    ("--provider=", "auto cpu cuda"),
    ("--provider CUDA", "auto cpu cuda"),
]


@pytest.mark.parametrize(("args", "words"), REFUSED, ids=[args for args, _ in REFUSED])
def test_generate_refuses_what_cannot_be_meant(args: str, words: str, cond: Path, tarflow: Door) -> None:
    tarflow("generate", cond, *args.split()).refused(USAGE, *words.split())


def test_more_samples_than_memory_can_hold_are_refused_at_once(cond: Path, tmp_path: Path) -> None:
    """Under a limit of address space, so that a mistake here does not take the machine's memory."""
    limited = ["prlimit", f"--as={8 << 30}", *TARFLOW, "generate", str(cond), "--n", str(10**9)]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20)
    Outcome(done.returncode, done.stdout, done.stderr).refused(MACHINE, "memory", "--n")


def test_guidance_of_an_unconditional_model_says_that_it_does_nothing(uncond: Path, tarflow: Door) -> None:
    message = tarflow("generate", uncond, "--guidance", 1).refused(USAGE, "does nothing", "unconditional")
    assert "give labels" not in message, "an unconditional model has none"


def test_labels_of_an_unconditional_model_are_refused(uncond: Path, tarflow: Door) -> None:
    tarflow("generate", uncond, "--labels", 0).refused(USAGE, "unconditional", "labels")


def test_an_unconditional_model_is_guided_by_attention_temperature(uncond: Path, tarflow: Door) -> None:
    found = tarflow("generate", uncond, "--n", 1, "--guidance", 1, "--attention-temperature", 0.8, "--save", "x.npy")
    assert found.code == OK, found.err


def test_cuda_on_a_machine_without_it_says_what_to_install(cond: Path, tarflow: Door) -> None:
    import onnxruntime

    if GPU in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    tarflow("generate", cond, "--provider", "cuda").refused(MACHINE, "onnxruntime-gpu", "--provider cpu")


def test_an_unknown_engine_is_refused_before_anything_is_read(tarflow: Door) -> None:
    tarflow("export", "nothing.pth", "--engine", "fp8", "-o", "out").refused(USAGE, "fp8", "fp32, fp16")


# --- generate: arrays --------------------------------------------------------------------------------------------


def spoiled_array(kind: str, path: Path, good: np.ndarray[Any, Any], bomb: Path) -> None:
    """Write at ``path`` a file that is no good array of numbers."""
    whole = path.with_name("whole")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("0 1 2 3")
    elif kind == "truncated":
        with whole.open("wb") as file:
            np.save(file, good)
        path.write_bytes(whole.read_bytes()[:-4])
        whole.unlink()
    elif kind == "header only":
        path.write_bytes(b"\x93NUMPY\x01\x00")
    elif kind == "header that claims terabytes":
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 16, 12), }\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    elif kind == "header that is code":
        header = b"{'descr': __import__('os').mkdir('bomb'), 'fortran_order': False, 'shape': (1,), }\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, good)
    elif kind == "zip cut short":
        path.write_bytes(b"PK\x03\x04" + b"\0" * 40)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(bomb)))
    elif kind == "objects":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb(bomb)] * len(good), object), allow_pickle=True)
    elif kind == "folder":
        path.mkdir()
    else:
        raise AssertionError(kind)


SPOILED = ["empty", "text", "truncated", "header only", "header that claims terabytes", "header that is code"]
SPOILED += ["npz", "zip cut short", "pickle", "objects", "folder"]


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("what", ["noise", "labels", "images"])
def test_a_file_that_is_no_array_is_refused_and_never_unpickled(
    what: str, kind: str, cond: Path, tmp_path: Path, tarflow: Door
) -> None:
    good = {
        "noise": np.zeros((2, 16, 12)),
        "labels": np.zeros(2),
        "images": np.zeros((2, 3, 8, 8)),
    }[what]
    bomb = tmp_path / "bomb"
    spoiled_array(kind, tmp_path / "a.npy", good, bomb)
    if what == "images":
        found = tarflow("likelihood", cond, "a.npy")
    else:
        found = tarflow("generate", cond, "--n", 2, f"--{what}", "a.npy")
    found.refused(USAGE, *(["no images"] if (what, kind) == ("images", "folder") else ["a.npy"]))
    assert not bomb.exists()


NOISE: list[tuple[str, Any, str]] = [
    ("too few patches", np.zeros((2, 15, 12), np.float32), "(N, 16, 12)"),
    ("transposed", np.zeros((2, 12, 16), np.float32), "(N, 16, 12)"),
    ("one sample without its axis", np.zeros((16, 12), np.float32), "(N, 16, 12)"),
    ("an axis too many", np.zeros((1, 2, 16, 12), np.float32), "(N, 16, 12)"),
    ("no samples", np.zeros((0, 16, 12), np.float32), ""),
    ("a number", np.float32(1), "(N, 16, 12)"),
    ("complex", np.zeros((2, 16, 12), np.complex64), "float32"),
    ("text", np.full((2, 16, 12), "x"), "float32"),
    ("truth values", np.zeros((2, 16, 12), bool), "float32"),
    ("NaN", np.pad(np.full((1, 1, 1), np.nan, np.float32), ((1, 0), (3, 12), (0, 11))), "row 1"),
    ("infinite", np.full((2, 16, 12), -np.inf, np.float32), "not finite"),
    ("beyond float32", np.full((2, 16, 12), 1e300), "not finite"),
]


@pytest.mark.parametrize(("array", "words"), [case[1:] for case in NOISE], ids=[case[0] for case in NOISE])
def test_noise_that_does_not_fit_is_refused(
    array: Any, words: str, cond: Path, tmp_path: Path, tarflow: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "z.npy", array)
    tarflow("generate", cond, "--noise", "z.npy").refused(USAGE, words)


def test_noise_and_another_number_of_samples_are_refused(cond: Path, tmp_path: Path, tarflow: Door) -> None:
    np.save(tmp_path / "z.npy", np.zeros((2, 16, 12), np.float32))
    tarflow("generate", cond, "--noise", "z.npy", "--n", 3).refused(USAGE, "holds 2")


def test_noise_cannot_be_redrawn(cond: Path, tmp_path: Path, tarflow: Door) -> None:
    np.save(tmp_path / "z.npy", np.zeros((2, 16, 12), np.float32))
    tarflow("generate", cond, "--noise", "z.npy", "--redraw-nonfinite").refused(USAGE, "redraw")


LABELS: list[tuple[str, Any]] = [
    ("too few", np.zeros(3, np.int64)),
    ("too many", np.zeros(5, np.int64)),
    ("none", np.zeros(0, np.int64)),
    ("floats", np.zeros(4, np.float32)),
    ("truth values", np.zeros(4, bool)),
    ("a column", np.zeros((4, 1), np.int64)),
    ("one number", np.int64(1)),
    ("out of range", np.array([0, 1, 2, 5])),
    ("beyond int64", np.array([0, 0, 0, 2**63], np.uint64)),
]


@pytest.mark.parametrize("array", [case[1] for case in LABELS], ids=[case[0] for case in LABELS])
def test_a_file_of_labels_that_does_not_fit_is_refused(
    array: Any, cond: Path, tmp_path: Path, tarflow: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "y.npy", array)
    tarflow("generate", cond, "--n", 4, "--labels", "y.npy").refused(USAGE)


# --- where results go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--save", "-o"])
@pytest.mark.parametrize("place", ["missing/x", "folder", "file/x", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_sampling(
    place: str, option: str, cond: Path, tmp_path: Path, tarflow: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    no_sampling(monkeypatch)
    found = tarflow("generate", cond, "--n", 1, option, place)
    found.refused(found.code, place)
    assert found.code in (USAGE, MACHINE)


@pytest.mark.parametrize("place", ["/sys/tarflow.npy", "/proc/tarflow.npy"])
def test_a_folder_that_takes_no_files_is_the_machines_fault(place: str, cond: Path, tarflow: Door) -> None:
    tarflow("generate", cond, "--n", 1, "--save", place).refused(MACHINE, place)


@pytest.mark.parametrize("command", ["likelihood", "denoise"])
def test_results_about_images_into_a_missing_folder_are_refused(
    command: str, cond: Path, tmp_path: Path, tarflow: Door
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    tarflow(command, cond, "x.npy", "--save", "missing/z.npz").refused(USAGE, "missing", "mkdir")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with replacing(path) as file:
            file.write(b"n")
            file.flush()
            assert path.read_bytes() == b"old"
            file.write(b"ew")
        assert reader.read() == b"old", "who has it open keeps reading the old one"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def failing_write(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as file:
        file.write(b"new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_writing_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error):
        failing_write(path, error)
    assert contents(tmp_path) == {"x": b"old"}


def test_a_new_file_has_the_rights_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "replaced") as file:
        file.write(b"x")
    with replacing_folder(tmp_path / "made", False) as folder:
        (folder / MANIFEST).touch()
    (tmp_path / "folder").mkdir()
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert (mode["replaced"], mode["made"]) == (mode["plain"], mode["folder"])


def test_every_file_of_a_bundle_is_as_readable_as_the_user_says(cond: Path) -> None:
    """A bundle is made to be handed on."""
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in cond.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_picture_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(TypeError):
        write_png(tmp_path / "x.png", np.zeros((4, 4, 3), np.complex64), {})
    assert contents(tmp_path) == {"x.png": b"old"}


# --- export: where the bundle goes -------------------------------------------------------------------------------


def test_an_existing_bundle_is_kept_without_force(golden: Any, cond: Path, tmp_path: Path, tarflow: Door) -> None:
    shutil.copytree(cond, tmp_path / "bundle")
    tarflow("export", golden("cond").checkpoint, "-o", "bundle").refused(USAGE, "exists", "--force")


@pytest.mark.parametrize(
    "kind", ["folder of something", "file", "link", "foreign manifest.json", "folder with an own manifest"]
)
def test_what_is_no_bundle_is_never_replaced(
    kind: str, golden: Any, tmp_path: Path, tarflow: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        (tmp_path / "real").mkdir()
        path.symlink_to(tmp_path / "real")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    if kind == "foreign manifest.json":  # as every browser extension and web application has
        (path / MANIFEST).write_text(json.dumps({"name": "My extension", "manifest_version": 3}))
    if kind == "folder with an own manifest":
        (path / MANIFEST).write_text("not even JSON")
    no_tracing(monkeypatch)
    tarflow("export", golden("cond").checkpoint, "-o", "precious", "--force").refused(USAGE, "--force", "another name")


@pytest.mark.parametrize("place", ["file/bundle", "file/a/b", "/sys/bundle", "/proc/bundle", "x" * 300])
def test_a_bundle_where_none_can_be_is_refused(place: str, golden: Any, tmp_path: Path, tarflow: Door) -> None:
    (tmp_path / "file").write_text("mine")
    found = tarflow("export", golden("cond").checkpoint, "-o", place)
    found.refused(found.code)
    assert found.code in (USAGE, MACHINE)


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_bundle_in_place_of_a_folder_in_use_is_refused(
    place: str, golden: Any, tarflow: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_tracing(monkeypatch)
    for force in ([], ["--force"]):
        tarflow("export", golden("cond").checkpoint, "-o", place, *force).refused(USAGE)


def test_a_failed_export_leaves_no_new_folders(tarflow: Door, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"junk")
    tarflow("export", "x.pth", "-o", "a/b/c").refused(ARTIFACT, "x.pth")


def failing_replacement(folder: Path) -> None:
    with replacing_folder(folder, True) as partial:
        (partial / MANIFEST).write_text("new")
        raise KeyboardInterrupt


def test_a_failure_leaves_the_bundle_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text('{"format": "tarflow-bundle"}')
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        failing_replacement(tmp_path / "bundle")
    assert contents(tmp_path) == before


# --- a full disk -------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    """Whether this user may mount a file system of its own, seen by nobody else."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def on_a_small_disk(disk: Path, args: list[str]) -> tuple[Outcome, str]:
    """The command with ``disk`` a file system of 64 KiB, and a listing of what is on it afterwards."""
    disk.mkdir()
    script = 'mount -t tmpfs -o size=64k none "$0" || exit 99; "$@"; code=$?; find "$0" >"$0.listing"; exit $code'
    command = ["unshare", "-m", "sh", "-c", script, str(disk), *TARFLOW, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr), disk.with_name(disk.name + ".listing").read_text()


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs (unshare -m): run as root")
@pytest.mark.parametrize("command", ["generate --save", "generate -o", "export"])
def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_left(
    command: str, golden: Any, cond: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    if command == "export":
        args = ["export", str(golden("cond").checkpoint), "-o", str(disk / "bundle")]
    else:
        args = [*command.split()[:1], str(cond), "--n", "500", "--no-certify", "--no-denoise"]
        args += [command.split()[1], str(disk / "x")]
    found, listing = on_a_small_disk(disk, args)
    found.refused(MACHINE, "disk is full", str(disk))
    assert listing.split() == [str(disk)]


def test_a_pipe_nobody_can_write_to_is_no_traceback(cond: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*TARFLOW, "inspect", str(cond)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    Outcome(done.returncode, "", done.stderr).refused(MACHINE, "disk is full")


# --- interruption ------------------------------------------------------------------------------------------------


def interrupted(args: list[str], cwd: Path, working: str, number: signal.Signals) -> Outcome:
    """Run the command until it says that it is ``working``, give it a moment, and send it a signal."""
    process = subprocess.Popen(
        [*TARFLOW, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        seen = ""
        while working not in seen:
            line = process.stderr.readline()
            assert line, f"ended before it was working: {seen}"
            seen += line
        time.sleep(0.7)
        assert process.poll() is None, "ended before it could be interrupted"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in err
    return Outcome(process.returncode, out, seen + err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_generate_leaves_nothing(number: signal.Signals, code: int, cond: Path, tmp_path: Path) -> None:
    args = ["generate", str(cond), "--n", "300000", "--batch-size", "16", "--save", "x.npy", "-o", "x.png"]
    found = interrupted(args, tmp_path, "no labels given", number)
    assert (found.code, found.out) == (code, "")
    assert contents(tmp_path) == {}
    if number == signal.SIGINT:
        assert "tarflow: interrupted" in found.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_the_bundle_that_was_there(
    number: signal.Signals, code: int, golden: Any, cond: Path, tmp_path: Path
) -> None:
    shutil.copytree(cond, tmp_path / "bundle")
    before = contents(tmp_path)
    args = ["export", str(golden("cond").checkpoint), "-o", "bundle", "--force"]
    found = interrupted(args, tmp_path, "trace", number)
    assert (found.code, found.out) == (code, "")
    assert contents(tmp_path) == before
    if number == signal.SIGINT:
        assert "tarflow: interrupted" in found.err


# --- checkpoints -------------------------------------------------------------------------------------------------

NAME = "uncond_model_1_128_2_1_0.10.pth"


@pytest.fixture
def state(golden: Any) -> dict[str, torch.Tensor]:
    """A good state dict, to be spoiled."""
    path = golden("uncond").checkpoint
    assert path.name == NAME
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


@pytest.fixture
def refused_checkpoint(tarflow: Door, tmp_path: Path) -> Callable[..., str]:
    """refused_checkpoint(code, *words): export the checkpoint lying in the folder, and check how it fails."""

    def run(code: int, *words: str, name: str = NAME, options: tuple[object, ...] = ()) -> str:
        return tarflow("export", name, "-o", "out", *options).refused(code, *words)

    return run


Refused = Callable[..., str]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("container", ["zip", "old", "bare pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(
    container: str, protocol: int, tmp_path: Path, refused_checkpoint: Refused
) -> None:
    bomb = tmp_path / "bomb"
    content = {"blocks.0.pos_embed": Bomb(bomb)}
    if container == "bare pickle":
        (tmp_path / NAME).write_bytes(pickle.dumps(content, protocol))
    else:
        zipped = container == "zip"
        torch.save(content, tmp_path / NAME, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    refused_checkpoint(ARTIFACT, NAME)
    assert not bomb.exists()
    if container == "zip" and protocol == 2:  # shows that the bomb works
        torch.load(tmp_path / NAME, weights_only=False)
        assert bomb.exists()


def test_a_whole_model_pickled_is_refused_with_the_way_to_save_it(tmp_path: Path, refused_checkpoint: Refused) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / NAME)
    refused_checkpoint(ARTIFACT, "state_dict")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(
    share: float, suffix: str, state: dict[str, torch.Tensor], tmp_path: Path, refused_checkpoint: Refused
) -> None:
    path = tmp_path / Path(NAME).with_suffix(suffix)
    if suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused_checkpoint(ARTIFACT, path.name, name=path.name)


@pytest.mark.parametrize("kind", ["a zip of texts", "text", "zeros", "junk", "a list", "a tensor", "numbered tensors"])
def test_a_file_that_is_no_checkpoint_is_refused(kind: str, tmp_path: Path, refused_checkpoint: Refused) -> None:
    path = tmp_path / NAME
    if kind == "a zip of texts":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<xml/>")
    elif kind == "a list":
        torch.save([torch.zeros(1)], path)
    elif kind == "a tensor":
        torch.save(torch.zeros(1), path)
    elif kind == "numbered tensors":
        torch.save({1: torch.zeros(1)}, path)
    else:
        path.write_bytes({"text": b"hello\n" * 50, "zeros": b"\0" * 999, "junk": bytes(range(256)) * 9}[kind])
    refused_checkpoint(ARTIFACT, NAME)


@pytest.mark.parametrize("container", ["zip", "old"])
def test_a_checkpoint_with_any_byte_damaged_never_ends_in_a_traceback(
    container: str, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pickled names and shapes of a checkpoint, damaged in a hundred places."""
    path, random = tmp_path / NAME, np.random.default_rng(0)
    small_models_only(monkeypatch)
    torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    content, pickled = path.read_bytes(), range(3000)
    if container == "zip":
        with zipfile.ZipFile(path) as archive:
            names = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        start = content.index(names)
        pickled = range(start, start + len(names))
    for position in random.choice(pickled, 100):
        spoiled = bytearray(content)
        spoiled[position] ^= int(random.integers(1, 256))
        path.write_bytes(spoiled)
        with contextlib.suppress(CheckpointError, ConfigError):  # or it loads: not every byte matters
            load(path)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("STARFlow", ["blocks.0.sos_embed", "blocks.0.attn_blocks.0.mlp.gate_proj.weight"]),
        ("iTARFlow", ["blocks.0.time_embed.weight", "blocks.0.attn_blocks.0.adaLN_modulation.1.weight"]),
    ],
)
@pytest.mark.parametrize("complete", [True, False], ids=["as additions", "without our weights"])
def test_a_later_family_is_recognised(
    complete: bool,
    family: str,
    names: list[str],
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    refused_checkpoint: Refused,
) -> None:
    theirs = {name: torch.zeros(1, 128) for name in names}
    torch.save(state | theirs if complete else theirs, tmp_path / NAME)
    refused_checkpoint(ARTIFACT, family, names[0], "not supported")


@pytest.mark.parametrize(
    "name", ["blocks.1.proj_in.bias", "blocks.0.pos_embed", "blocks.0.attn_blocks.0.mlp.norm.weight"]
)
def test_a_missing_weight_is_named(
    name: str, state: dict[str, torch.Tensor], tmp_path: Path, refused_checkpoint: Refused
) -> None:
    del state[name]
    torch.save(state, tmp_path / NAME)
    refused_checkpoint(ARTIFACT, "missing", name)


@pytest.mark.parametrize(
    "name",
    [
        *("head.weight", "blocks.0.extra", "blocks.extra.weight", "blocks.x", "blocks."),
        *("blocks.0.attn_blocks.x.weight", "blocks.0.attn_blocks.", "blocks.-1.pos_embed"),
        *("blocks.1000000000.pos_embed", "blocks.0.attn_blocks.1000000000.norm.weight"),
    ],
)
def test_a_weight_too_many_is_named(
    name: str,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    refused_checkpoint: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_models_only(monkeypatch)
    torch.save(state | {name: torch.zeros(2)}, tmp_path / NAME)
    refused_checkpoint(ARTIFACT, name)


def test_a_configuration_far_beyond_the_weights_is_refused_before_a_model_is_made(
    golden: Any, tmp_path: Path, refused_checkpoint: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    model = load(golden("uncond").checkpoint)
    small_models_only(monkeypatch)
    huge = 10**9
    for spoiled in ({"blocks": huge}, {"layers": huge}, {"blocks": "2"}, {"blocks": 0}, {"head_dim": 48}, {"new": 1}):
        config = json.dumps(model.config.to_dict() | spoiled)
        save_file(reference_state(model), tmp_path / "x.safetensors", {CONFIG_KEY: config})
        refused_checkpoint(ARTIFACT, "x.safetensors", name="x.safetensors")
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"blocks": NaN}'):
        save_file(reference_state(model), tmp_path / "x.safetensors", {CONFIG_KEY: text})
        refused_checkpoint(ARTIFACT, "x.safetensors", name="x.safetensors")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.pos_embed", (4, 128)),
        ("blocks.0.proj_in.weight", (128,)),
        ("blocks.0.proj_in.weight", ()),
        ("blocks.0.proj_out.bias", ()),
        ("blocks.0.proj_out.weight", (5, 128)),
        ("blocks.0.attn_blocks.0.attention.qkv.weight", (384, 64)),
        ("blocks.0.class_embed", ()),
        ("blocks.0.class_embed", (10, 64)),
        ("var", (1, 1)),
    ],
)
def test_a_weight_of_another_shape_is_named(
    name: str,
    shape: tuple[int, ...],
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    refused_checkpoint: Refused,
) -> None:
    torch.save(state | {name: torch.zeros(shape)}, tmp_path / NAME)
    refused_checkpoint(ARTIFACT, "class_embed" if "class_embed" in name else name)


def test_a_number_of_patches_that_is_no_square_is_refused(
    state: dict[str, torch.Tensor], tmp_path: Path, refused_checkpoint: Refused
) -> None:
    for block in range(2):
        state[f"blocks.{block}.pos_embed"] = torch.zeros(15, 128)
    torch.save(state, tmp_path / NAME)
    refused_checkpoint(USAGE, "15", "square")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(
    number: float, state: dict[str, torch.Tensor], tmp_path: Path, refused_checkpoint: Refused
) -> None:
    state["blocks.1.proj_in.weight"][0, 0] = number
    torch.save(state, tmp_path / NAME)
    refused_checkpoint(ARTIFACT, "blocks.1.proj_in.weight", "not finite")


def test_a_weight_beyond_float16_is_refused_for_fp16_with_a_way_out(
    state: dict[str, torch.Tensor], tmp_path: Path, refused_checkpoint: Refused
) -> None:
    state["blocks.1.attn_blocks.0.attention.qkv.weight"][0, 0] = 1e6
    torch.save(state, tmp_path / NAME)
    refused_checkpoint(USAGE, "qkv", "--engine bf16", options=("--engine", "fp16"))


def options_named(message: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", message))


def test_a_name_that_says_nothing_asks_for_exactly_what_is_missing_and_then_works(
    golden: Any, tmp_path: Path, tarflow: Door
) -> None:
    shutil.copy(golden("uncond").checkpoint, tmp_path / "model.pth")
    patch, noise = ("--patch-size", 1), ("--noise-std", 0.1)
    message = tarflow("export", "model.pth").refused(USAGE, "model.pth")
    assert options_named(message) == {"--patch-size", "--noise-std", "--channels"}  # channels: another way to say it
    assert options_named(tarflow("export", "model.pth", *patch).refused(USAGE)) == {"--noise-std"}
    assert options_named(tarflow("export", "model.pth", *noise).refused(USAGE)) == {"--patch-size", "--channels"}
    found = tarflow("export", "model.pth", *patch, *noise, "--dry-run", "--json")
    assert found.code == OK, found.err
    config = json.loads(found.out)["config"]
    case = golden("uncond").case
    assert (config["patch_size"], config["channels"], config["image_size"], config["noise_std"]) == (
        1,
        case["in_channels"],
        case["image_size"],
        0.1,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--patch-size", 3), "one of 1 (3 channels), 2 (3 channels)"),
        (("--patch-size", 0), "patch size"),
        (("--patch-size", -2), "patch size"),
        (("--channels", 5), "channels"),
        (("--channels", 0), "channels"),
        (("--noise-std", "much"), "uniform"),
        (("--noise-std", -0.1), "noise"),
        (("--noise-std", "nan"), "noise"),
        (("--noise-std", "inf"), "noise"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_weights_are_refused(
    options: tuple[object, ...], words: str, golden: Any, tarflow: Door
) -> None:
    message = tarflow("export", golden("cond").checkpoint, "-o", "out", *options).refused(USAGE)
    assert words.split()[0] in message


def test_a_damaged_bundle_is_not_exported_again(cond: Path, tmp_path: Path, tarflow: Door) -> None:
    folder = shutil.copytree(cond, tmp_path / "bundle")
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    tarflow("export", "bundle", "-o", "out").refused(ARTIFACT, "weights.safetensors", "SHA-256")


def test_a_checkpoint_of_another_model_is_not_compared(golden: Any, cond: Path, tarflow: Door) -> None:
    tarflow("verify", cond, golden("uncond").checkpoint).refused(USAGE, "width 128 against 64")


def test_a_card_that_is_not_ours_does_not_stop_inspection(cond: Path, tmp_path: Path, tarflow: Door) -> None:
    """The parity card is for people: a reader of another version's bundle shows what it understands."""
    folder = shutil.copytree(cond, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text())
    for card in ({"later": 1}, {"blocks": [1]}, {"blocks": None, "sample": "good"}, {"certificate": "small"}):
        (folder / MANIFEST).write_text(json.dumps(manifest | {"parity": card}))
        found = tarflow("inspect", "bundle")
        assert found.code in (OK, ARTIFACT), found.err


# --- images ------------------------------------------------------------------------------------------------------

IMAGES: list[tuple[str, Any, str]] = [
    ("another size", np.zeros((2, 3, 16, 16), np.float32), "(N, 3, 8, 8)"),
    ("channels last", np.zeros((2, 8, 8, 3), np.float32), "(N, 3, 8, 8)"),
    ("bytes of another size", np.zeros((2, 3, 9, 8), np.uint8), "3, 8, 8"),
    ("bytes without an axis", np.zeros((3, 8, 8), np.uint8), "3, 8, 8"),
    ("one image without its axis", np.zeros((3, 8, 8), np.float32), "(N, 3, 8, 8)"),
    ("no images", np.zeros((0, 3, 8, 8), np.float32), ""),
    ("no images of bytes", np.zeros((0, 3, 8, 8), np.uint8), ""),
    ("a number", np.float32(0), "(N, 3, 8, 8)"),
    ("a byte", np.uint8(0), "3, 8, 8"),
    ("integers", np.zeros((2, 3, 8, 8), np.int64), "int64"),
    ("complex", np.zeros((2, 3, 8, 8), np.complex64), "complex64"),
    ("NaN", np.full((2, 3, 8, 8), np.nan, np.float32), "not finite"),
    ("beyond float32", np.full((2, 3, 8, 8), 1e300), "not finite"),
]


@pytest.mark.parametrize("command", ["likelihood", "denoise"])
@pytest.mark.parametrize(("array", "words"), [case[1:] for case in IMAGES], ids=[case[0] for case in IMAGES])
def test_images_that_do_not_fit_are_refused(
    array: Any, words: str, command: str, cond: Path, tmp_path: Path, tarflow: Door
) -> None:
    np.save(tmp_path / "x.npy", array)
    words = "3, 8, 8" if command == "denoise" and "byte" in words else words
    tarflow(command, cond, "x.npy").refused(USAGE, words)


@pytest.mark.parametrize(
    "kind",
    ["empty", "no pictures", "broken", "truncated", "not an image", "too large", "gigantic", "16 bits"],
)
def test_a_folder_of_pictures_that_do_not_fit_is_refused(kind: str, cond: Path, tmp_path: Path, tarflow: Door) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    good = path.read_bytes()
    if kind == "empty":
        path.unlink()
    elif kind == "no pictures":
        path.rename(folder / "a.txt")
    elif kind == "broken":
        path.write_bytes(good[:50] + bytes(len(good) - 50))
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "not an image":
        path.write_text("hello")
    elif kind == "too large":
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path)
    elif kind == "16 bits":
        Image.fromarray(np.full((8, 8), 300, np.uint16)).save(path)
    else:
        header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        path.write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    named = ["photos"] if kind in ("empty", "no pictures") else [path.name]
    tarflow("likelihood", cond, "photos").refused(USAGE, *named)


def test_labels_of_images_are_checked(cond: Path, tmp_path: Path, tarflow: Door) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.float32))
    np.save(tmp_path / "y.npy", np.zeros(3, np.int64))
    tarflow("likelihood", cond, "x.npy", "--labels", "y.npy").refused(USAGE, "2 integers")
    tarflow("likelihood", cond, "x.npy", "--labels", "9").refused(USAGE, "0 to 4")


def test_a_model_without_gaussian_noise_is_not_denoised(uncond: Path, tmp_path: Path, tarflow: Door) -> None:
    folder = shutil.copytree(uncond, tmp_path / "bundle")
    document = json.loads((folder / MANIFEST).read_text())
    document["config"]["noise_std"] = None
    weights = (folder / WEIGHTS).read_bytes()
    assert weights.count(b'\\"noise_std\\": 0.1,') == 1
    (folder / WEIGHTS).write_bytes(weights.replace(b'\\"noise_std\\": 0.1,', b'\\"noise_std\\":null,'))
    document["files"][WEIGHTS]["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(document))
    image = Bundle.open(folder).manifest.config.image
    np.save(tmp_path / "x.npy", np.zeros((1, *image), np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, *image), np.uint8))
    tarflow("generate", "bundle", "--denoise").refused(USAGE, "uniform dequantisation", "--no-denoise")
    tarflow("denoise", "bundle", "x.npy").refused(USAGE, "uniform dequantisation")
    tarflow("likelihood", "bundle", "none.npy").refused(USAGE)
