"""What a user can get wrong: one message that says what to do, the documented exit code, and nothing half-written.

Most cases call the command line's ``main`` in this process; what is about processes, signals and disks runs it as one.
"""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.cli.main import main
from tarflow.runtime.bundle import MANIFEST
from tarflow.runtime.files import replacing, replacing_folder
from tarflow.runtime.flow import Flow

from .interrupting import interrupted

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
@pytest.mark.parametrize("what", ["noise", "labels"])
def test_a_file_that_is_no_array_is_refused_and_never_unpickled(
    what: str, kind: str, cond: Path, tmp_path: Path, tarflow: Door
) -> None:
    good = {"noise": np.zeros((2, 16, 12)), "labels": np.zeros(2)}[what]
    bomb = tmp_path / "bomb"
    spoiled_array(kind, tmp_path / "a.npy", good, bomb)
    tarflow("generate", cond, "--n", 2, f"--{what}", "a.npy").refused(USAGE, "a.npy")
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_generate_leaves_nothing(number: signal.Signals, code: int, cond: Path, tmp_path: Path) -> None:
    args = ["generate", str(cond), "--n", "300000", "--batch-size", "16", "--save", "x.npy", "-o", "x.png"]
    done = interrupted([*args], tmp_path, "no labels given", number)
    assert (done.returncode, done.stdout) == (code, "")
    assert contents(tmp_path) == {}
    if number == signal.SIGINT:
        assert "tarflow: interrupted" in done.stderr
