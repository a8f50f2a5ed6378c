"""The command line from outside: one JSON document, quiet pipes, files that say where they come from; and what a user
can get wrong: one message that says what to do, the documented exit code, and nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.cli.console import parse_labels
from tarflow.cli.main import _missing
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError, InputError
from tarflow.runtime.flow import Flow, Guidance

from .conftest import DEMO, Cli, Done, Exported, Goldens, largest, refused, said
from .interrupting import TARFLOW, interrupted

USAGE, MACHINE, ARTIFACT, INTERRUPTED = 2, 3, 4, 130


@pytest.fixture
def cond(bundle: Exported) -> Path:
    """Five classes, trained with Gaussian noise."""
    return bundle("cond")


def test_generate_writes_what_the_library_draws_and_says_where_from(cli: Cli, tmp_path: Path) -> None:
    what = "--n 12 --labels 0-9 --guidance 1 --seed 3 --first-sample 5 --save s.npy -o grid.png --json"
    report = said(cli("generate", *what.split(), cwd=tmp_path))
    flow = Flow.open(DEMO)
    labels = (np.arange(12) + 5) % 10
    expected = flow.sample(12, labels=labels, guidance=Guidance(1.0), seed=3, first_sample=5)
    assert largest(np.load(tmp_path / "s.npy"), expected) < 1e-5
    assert (report["bundle_hash"], len(report["certificate"]["per_sample"])) == (flow.bundle.hash, 12)
    assert report["certificate"]["max"] < 1e-4
    checked = flow.sample(12, labels=labels, guidance=1.0, seed=3, first_sample=5, certify=True)
    assert largest(np.array(report["log_prob"]), checked.log_prob) < 1e-3
    assert (report["first_sample"], report["density"]) == (5, checked.report.density)
    with Image.open(tmp_path / "grid.png") as picture:
        text = picture.text  # type: ignore[attr-defined]  # of PNG images only
    assert (text["seed"], text["sample_indices"], text["bundle_hash"]) == ("3", "5-16", flow.bundle.hash)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "s.npy"]


def test_generate_takes_the_bundle_in_the_working_folder_before_the_demo(bundle: Exported, tarflow: Cli) -> None:
    Path("tarflow-bundle").symlink_to(bundle("uncond"))
    assert said(tarflow("generate", "--n", 1, "--json"))["bundle"] == "tarflow-bundle"
    assert Path("samples.png").exists()


def test_export_without_a_checkpoint_exports_the_demo_and_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    planned = said(cli("export", "--dry-run", "--json", "--engine", "fp16", cwd=tmp_path))
    found = planned["bundle"], planned["precision"], planned["config"]["classes"]
    assert found == ("tarflow-bundle", "fp16", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["inspect"], ["doctor"], ["bench", "--batch", "1", "--repeats", "1"], ["verify", DEMO]]
)
def test_json_is_one_document_on_stdout(cli: Cli, command: list[object], tmp_path: Path) -> None:
    assert isinstance(said(cli(*command, "--json", cwd=tmp_path)), dict)
    plain = cli(*command, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout
    assert "\x1b" not in plain.stdout + plain.stderr, "escape codes where there is no terminal"


def test_denoise_and_likelihood_read_folders_and_arrays(cli: Cli, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    np.save(tmp_path / "in.npy", pixels[:, None])
    folder, array = (said(cli("likelihood", DEMO, x, "--labels", 3, "--json", cwd=tmp_path)) for x in ("in", "in.npy"))
    assert folder["bits_per_dim"] == array["bits_per_dim"]
    assert folder["names"] == ["0.png", "1.png", "2.png"]
    said(cli("denoise", DEMO, "in", "--save", "out.npy", "--json", cwd=tmp_path))
    expected = Flow.open(DEMO).denoise(pixels[:, None].astype(np.float32) / 127.5 - 1)
    assert largest(np.load(tmp_path / "out.npy"), expected) < 1e-5


def test_sub_folders_are_classes_where_they_are_as_many(cli: Cli, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8)).astype(np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "in" / f"{i}").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{i}" / "x.png")
    np.save(tmp_path / "in.npy", pixels[:, None])
    by_folder = cli("likelihood", DEMO, "in", "--json", cwd=tmp_path)
    by_label = cli("likelihood", DEMO, "in.npy", "--labels", "0-9", "--json", cwd=tmp_path)
    assert by_folder.returncode == by_label.returncode == 0, by_folder.stderr
    assert json.loads(by_folder.stdout)["bits_per_dim"] == json.loads(by_label.stdout)["bits_per_dim"]
    shown = cli("likelihood", DEMO, "in", cwd=tmp_path).stdout
    assert "under the classes of the sub-folders: '0' 0, '1' 1, '2' 2," in shown
    shutil.rmtree(tmp_path / "in" / "9")
    (tmp_path / "in" / "0" / "x.heic").touch()
    done = cli("likelihood", DEMO, "in", cwd=tmp_path)
    assert done.returncode == 2
    assert "has 9 sub-folders, which are classes, and this model has 10 classes" in done.stderr
    assert "left out of 'in': 1 .heic" in done.stderr
    assert cli("likelihood", DEMO, "in", "--labels", "-1", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("text", "labels"),
    [("3", [3, 3, 3, 3]), ("0-2", [1, 2, 0, 1]), ("5,7-8", [7, 8, 5, 7]), ("-1", [-1, -1, -1, -1]), (None, None)],
)
def test_labels_are_dealt_out_by_sample_index(text: str | None, labels: list[int] | None) -> None:
    found = parse_labels(text, first=1, count=4)
    assert (None if found is None else found.tolist()) == labels


@pytest.mark.parametrize(
    "text", ["", "cat", "3-1", "3-", "1,,2", "1;2", "0-99999999", "9" * 19, "-" + "9" * 26, "1.5", "--"]
)
def test_labels_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="labels"):
        parse_labels(text, 0, 4)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


UNPARSED = (
    "generate --colour red; generate --n many; generate --n 1.5; generate --seed=; generate --guidance strong; "
    "verify one two three; export --patch-size two; likelihood; verify; dance"
)


@pytest.mark.parametrize("line", UNPARSED.split("; "))
def test_a_command_line_that_does_not_parse_is_a_usage_error(line: str, tarflow: Cli) -> None:
    found = tarflow(*line.split())
    assert (found.returncode, found.stdout) == (USAGE, "")
    assert found.stderr.startswith("Usage: ")
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "line",
    [
        "generate --guidance text",
        "generate --n many",
        "export --patch-size four",
        "serve --port abc",
        "serve --port 99999",
        "serve --max-body big",
    ],
)
def test_a_value_of_another_type_is_shown(line: str, tarflow: Cli) -> None:
    found = tarflow(*line.split())
    _, option, value = line.split()
    assert found.returncode == USAGE
    assert f"Invalid value for '{option}'" in found.stderr
    assert value in found.stderr.split("Invalid value for")[1]


@pytest.mark.parametrize("name", ["nothing-here", "x" * 300, "x/" * 3000], ids=["absent", "long name", "long path"])
@pytest.mark.parametrize("command", ["generate", "inspect", "verify", "likelihood", "export"])
def test_a_path_to_nothing_is_refused(command: str, name: str, tarflow: Cli) -> None:
    found = tarflow(command, name, *(["images"] if command == "likelihood" else []))
    refused(found, found.returncode)
    assert found.returncode in (USAGE, MACHINE, ARTIFACT)


REFUSED = [
    ("--labels 0-9", "label 5 0 to 4 -1"),
    ("--labels=", "labels a class (3)"),
    ("--labels y.npy", "y.npy labels"),
    ("--n 0", "--n 1 or more"),
    ("--n 99999999999999999999", "--n"),
    ("--batch-size -1", "--batch-size 1 or more"),
    ("--seed 18446744073709551616", "seed 2^64"),
    ("--first-sample 18446744073709551615 --n 2", "--first-sample 2^64"),
    ("--guidance inf --labels 1", "--guidance inf"),
    ("--guidance 1", "guidance --labels does nothing"),
    ("--guidance 1 --labels -1", "does nothing"),
    ("--guidance 1 --labels 1 --guide=", "--guide expected ab"),
    ("--attention-temperature inf", "--attention-temperature positive"),
    ("--attention-temperature 0.5", "--attention-temperature does nothing"),
    ("--denoise --denoise-strength -1", "--denoise-strength strength"),
    ("--denoise --denoise-strength nan", "--denoise-strength strength"),
    ("--threads 0", "--threads"),
    ("--memory 0", "--memory"),
    ("--provider CUDA", "--provider auto cpu cuda"),
    ("--shard-size 16 --workers 2", "--shard-size --workers without --out"),
    ("--out x --save y.npy --batch-size 2", "--save --batch-size with --out"),
]


@pytest.mark.parametrize(("args", "words"), REFUSED, ids=[args for args, _ in REFUSED])
def test_generate_refuses_what_cannot_be_meant(args: str, words: str, cond: Path, tarflow: Cli) -> None:
    refused(tarflow("generate", cond, *args.split()), USAGE, *words.split())


def test_an_unconditional_model_is_not_told_to_take_labels(bundle: Exported, tarflow: Cli) -> None:
    message = refused(tarflow("generate", bundle("uncond"), "--guidance", 1), USAGE, "does nothing", "unconditional")
    assert "labels" not in message


def test_more_samples_than_memory_can_hold_are_refused_at_once(cond: Path, tmp_path: Path) -> None:
    """Under a limit of address space, so that a mistake here does not take the machine's memory."""
    limited = ["prlimit", f"--as={8 << 30}", *TARFLOW, "generate", str(cond), "--n", str(10**9)]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False)
    refused(done, MACHINE, "memory", "--n")


SHAPELESS = [np.zeros((2, 12, 16)), np.zeros((16, 12)), np.zeros((0, 16, 12)), np.float32(1)]
NO_LABELS = [np.zeros(3, int), np.zeros(4, np.float32), np.zeros(4, bool), np.zeros((4, 1), int), np.int64(1)]
ARRAYS: list[tuple[str, Any, str]] = [
    *(("--noise", array, "(N, 16, 12)") for array in SHAPELESS),
    ("--noise", np.zeros((4, 16, 12), np.complex64), "complex64"),
    ("--noise", np.full((4, 16, 12), "x"), "float32"),
    ("--noise", np.zeros((4, 16, 12), bool), "bool"),
    ("--noise", np.pad(np.full((1, 1, 1), np.nan, np.float32), ((1, 2), (3, 12), (0, 11))), "row 1"),
    ("--noise", np.full((4, 16, 12), 1e300), "not finite"),
    ("--noise", np.zeros((2, 16, 12), np.float32), "--n is 4; expected 2"),
    *(("--labels", array, "4 integers") for array in NO_LABELS),
    ("--labels", np.array([0, 1, 2, 5]), "label 5"),
    ("--labels", np.array([0, 0, 0, 2**63], np.uint64), "label"),
]


@pytest.mark.parametrize(("option", "array", "words"), ARRAYS)
def test_an_array_that_does_not_fit_is_refused(option: str, array: Any, words: str, cond: Path, tarflow: Cli) -> None:
    np.save("a.npy", array)
    refused(tarflow("generate", cond, "--n", 4, option, "a.npy"), USAGE, words)


@pytest.mark.parametrize(("option", "suffix"), [("--save", ".npy"), ("-o", ".png")])
@pytest.mark.parametrize("stem", ["missing/x", "folder", "file/x", "x" * 300, "/sys/tarflow", "/proc/tarflow"])
def test_an_output_that_cannot_be_written_is_refused_before_sampling(
    stem: str, option: str, suffix: str, cond: Path, tmp_path: Path, tarflow: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(Flow, "draw", lambda *_, **__: pytest.fail("sampled before the place was checked"))
    found = tarflow("generate", cond, "--n", 1, option, stem + suffix)
    refused(found, USAGE if stem in ("missing/x", "folder", "file/x") else MACHINE, stem + suffix)


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.npy", ".png"])
@pytest.mark.parametrize("command", ["generate {} --n 1 -o", "denoise {} in.npy -o"])
def test_a_picture_of_a_suffix_that_is_no_format_is_refused(
    command: str, name: str, cond: Path, tmp_path: Path, tarflow: Cli
) -> None:
    np.save("in.npy", np.zeros((1, *Bundle.open(cond).manifest.config.image), np.float32))
    refused(tarflow(*command.format(cond).split(), name), USAGE, f"'{name}'", ".png, .jpg, .jpeg or .webp")
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("generate {} --n 1 --save", ".npy or .npz"),
        ("denoise {} in.npy --save", ".npy or .npz"),
        ("likelihood {} in.npy --save", ".npz"),
        ("evaluate {} --save-stats", ".npz"),
    ],
)
@pytest.mark.parametrize("name", ["x.npx", "x"])
def test_an_array_of_a_suffix_that_is_no_format_is_refused(
    command: str, expected: str, name: str, cond: Path, tmp_path: Path, tarflow: Cli
) -> None:
    bundle = DEMO if command.startswith("evaluate") else cond
    np.save("in.npy", np.zeros((1, *Bundle.open(bundle).manifest.config.image), np.float32))
    refused(tarflow(*command.format(bundle).split(), name), USAGE, f"'{name}'", f"ending in {expected}:")
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_an_npz_holds_the_images_their_certificates_and_log_densities(cond: Path, tmp_path: Path, tarflow: Cli) -> None:
    for name in ("a.npy", "a.npz", "A.NPZ"):
        assert tarflow("generate", cond, "--n", 3, "--save", name).returncode == 0
    images, both = np.load("a.npy"), np.load("a.npz")
    assert both["images"].dtype == np.float32
    assert np.array_equal(both["images"], images)
    assert sorted(both) == ["certificate", "images", "log_prob"]
    assert both["certificate"].shape == both["log_prob"].shape == (3,)
    assert both["log_prob"].dtype == np.float64
    assert Path("a.npz").read_bytes() == Path("A.NPZ").read_bytes()
    assert tarflow("denoise", cond, "a.npy", "--save", "b.npz").returncode == 0
    assert np.load("b.npz")["images"].shape == images.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.NPZ", "a.npy", "a.npz", "b.npz"]


def can_mount() -> bool:
    """Whether this user may mount a file system of its own, seen by nobody else."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


FILLING = (
    "generate {} --n 500 --no-certify --no-denoise --save {}.npy",
    "generate {} --n 500 --no-denoise -o {}.png",
    "export {} -o {}",
)


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs (unshare -m): run as root")
@pytest.mark.parametrize("command", FILLING)
def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_left(command: str, cond: Path, tmp_path: Path) -> None:
    """With ``disk`` a file system of 64 KiB, what is on it listed before it is gone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    args = command.format(cond, disk / "x").split()
    script = 'mount -t tmpfs -o size=64k none "$0" || exit 99; "$@"; code=$?; find "$0" >"$0.listing"; exit $code'
    mounted = ["unshare", "-m", "sh", "-c", script, str(disk), *TARFLOW, *args]
    refused(subprocess.run(mounted, capture_output=True, text=True, check=False), MACHINE, "disk ", str(disk))
    assert (tmp_path / "disk.listing").read_text().split() == [str(disk)]


def test_a_pipe_nobody_can_write_to_is_no_traceback(cond: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [*TARFLOW, "inspect", str(cond)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    refused(Done(command, done.returncode, "", done.stderr), MACHINE, "disk is full")


def test_a_reader_that_has_seen_enough_is_no_failure(cond: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*TARFLOW, "inspect", str(cond)], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_stop_nothing(closed: str, tmp_path: Path) -> None:
    script = f'exec "$@" {closed}'
    command = ["sh", "-c", script, "sh", *TARFLOW, "generate", "--n", "1", "--save", "x.npy"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


UTF8 = "utf-8:strict"


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        ("generate {} --n 1 --save", UTF8),
        ("generate {} --n 1 --save", "ascii"),
        ("report {} --n 2 -o", UTF8),
        ("package {} --triton", UTF8),
    ],
)
def test_a_name_that_stdout_cannot_encode_is_escaped(
    command: str, encoding: str, cond: Path, cli: Cli, tmp_path: Path
) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9\xc3\xa9.npy")
    done = cli(*command.format(cond).split(), place, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9" in done.stdout
    assert place.exists()


def test_a_bundle_that_onnx_runtime_cannot_be_told_of_is_refused(cond: Path, tarflow: Cli, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"b\xe9")
    place.symlink_to(cond)
    refused(tarflow("generate", place), USAGE, "no text in UTF-8")
    refused(tarflow("export", cond, "-o", f"{place}2"), USAGE, "no text in UTF-8")


def test_a_fault_of_ours_is_told_from_a_failed_check(tarflow: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flow, "open", lambda *_: 1 // 0)
    done = tarflow("generate")
    assert (done.returncode, done.stdout) == (70, "")
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "a fault of tarflow's" in done.stderr.splitlines()[-1]


def test_a_failed_self_test_is_a_problem(tarflow: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {"cpu": {"ok": False, "message": "no"}, "cuda": {"ok": None, "message": "not here"}}
    monkeypatch.setattr("tarflow.cli.doctor._self_tests", lambda _: tests)
    monkeypatch.setattr("tarflow.cli.doctor._tensorrt", lambda _: ([], "not here"))
    done = tarflow("doctor")
    assert done.returncode == 1
    assert done.stdout.endswith("problem: self-test cpu: no\n")


def test_weights_of_a_file_that_has_both_are_chosen_by_a_flag(tarflow: Cli, golden: Goldens) -> None:
    checkpoint = golden("cond").checkpoint
    raw = torch.load(checkpoint, weights_only=True)
    torch.save({"net": raw, "ema_net": dict(raw)}, checkpoint.name)
    plan = "export", checkpoint.name, "--dry-run", "--json"
    assert "--weights chooses" in tarflow(*plan).stderr
    assert tarflow(*plan, "--weights", "raw").stderr == ""
    refused(tarflow(*plan, "--weights", "best"), USAGE, "--weights is 'best'; expected ema or raw or net or ema_net")


def test_a_wrong_patch_size_in_a_name_is_not_believed(tarflow: Cli, golden: Goldens, bundle: Exported) -> None:
    """Of 3 channels in patches of 2; as patches of 1 the same weights make images of 12 channels."""
    checkpoint = golden("cond").checkpoint
    wrong = Path(checkpoint.name.replace("_model_2_", "_model_1_"))
    shutil.copy(checkpoint, wrong)
    choices = "--patch-size: one of 1 (12 channels), 2 (3 channels)"
    refused(tarflow("export", wrong, "--dry-run"), USAGE, "would have 12 channels then", choices)
    asked = tarflow("export", wrong, "--dry-run", "--patch-size", 1)
    assert asked.returncode == 0
    assert "12 x 4 x 4" in asked.stdout
    for command in (("export", checkpoint, "--dry-run"), ("inspect", bundle("cond"))):
        told = tarflow(*command).stdout
        for words in ("3 x 8 x 8", "classes", "5", "read off the checkpoint's name, which has two decimals"):
            assert words in told


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("train", "torch", "train"),
        ("train --data digits", "sklearn", "train"),
        ("export", "torch", "export"),
        ("bench --rivals", "torch", "export"),
        ("serve", "fastapi", "serve"),
        ("build", "polygraphy", "tensorrt-rtx"),
        ("generate --out o --n 3 --ray", "ray", "ray"),
        ("generate --out o --n 3 --ray", "grpc", "ray"),
        ("serve --ray", "fastapi", "ray"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_has_all(
    command: str, missing: str, extra: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / missing).mkdir()
    why = f"raise ModuleNotFoundError(\"No module named '{missing}'\", name='{missing}')"
    (tmp_path / missing / "__init__.py").write_text(why)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = cli(*command.split(), cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    refused(done, MACHINE, "not installed", f"pip install 'tarflow[{extra}]'")
    assert "grpc" not in done.stderr, "which nobody installs by itself"


def test_every_package_of_an_extra_is_said_to_come_with_one_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tarflow", "generate"])
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    modules = {"scikit-learn": "sklearn", "onnx-ir": "onnx_ir", "tensorrt-cu13": "tensorrt", "cuda-python": "cuda"}
    modules |= {"prometheus-client": "prometheus_client"}
    for extra in ("export", "train", "tensorrt", "serve", "ray", "hub"):
        for package in (re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]):  # type: ignore[index]
            if package == "tarflow":
                continue
            brings = project["optional-dependencies"][_missing(f"{modules.get(package, package)}.part")[1]]
            assert any(line.startswith(package) for line in brings), package


def test_the_help_shows_whole_sentences(tarflow: Cli) -> None:
    listed = tarflow("--help").stdout.split("Commands:")[1]
    assert "..." not in listed
    words = " ".join(listed.split())
    assert "Draw samples from a bundle: noise, inverted block by block, denoised, as a picture or an array." in words
    assert words.count(". ") + 1 >= 17


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_file_that_the_manifest_does_not_name_is_refused(command: str, bundle: Exported, tarflow: Cli) -> None:
    shutil.copytree(bundle("uncond"), "bundle")
    Path("bundle/notes.txt").write_text("of a stranger")
    words = "'bundle' holds files its manifest does not name: notes.txt; remove them, or copy the bundle again"
    refused(tarflow(command, "bundle"), ARTIFACT, words)
    with pytest.raises(BundleError, match=r"does not name: notes\.txt"):
        Bundle.open("bundle").check()


def test_a_file_is_not_taken_for_a_bundle(tarflow: Cli) -> None:
    for name in ("model.pth", "model.safetensors", "notes.txt"):
        Path(name).write_text("x")
        message = refused(tarflow("inspect", name), ARTIFACT, f"'{name}' is a file; expected a bundle, a folder with")
        assert ("tarflow export" in message) == (name != "notes.txt")
        assert message.endswith(f"tarflow export {name} -o BUNDLE\n") or name == "notes.txt", message


def test_a_missing_bundle_is_not_taken_for_one_to_be_made(tarflow: Cli) -> None:
    refused(tarflow("generate", "mistyped"), ARTIFACT, "no bundle at 'mistyped'", "check the name", "export CHECKPOINT")


def test_a_limit_on_the_size_of_files_ends_training_in_one_sentence(tmp_path: Path) -> None:
    args = "train --steps 1 --batch-size 8 --width 64 --blocks 1 --layers 1 --sample-every 0 --threads 1 --out run"
    limited = f"ulimit -f 100; exec {shlex.join(TARFLOW)} {args}"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False)
    refused(done, MACHINE, "disk is full")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_generate_leaves_nothing(number: signal.Signals, code: int, cond: Path, tmp_path: Path) -> None:
    args = ["generate", str(cond), "--n", "300000", "--batch-size", "16", "--save", "x.npy", "-o", "x.png"]
    done = interrupted([*args], tmp_path, "no labels given", number)
    assert (done.returncode, done.stdout) == (code, "")
    assert not any(tmp_path.iterdir())
    if number == signal.SIGINT:
        assert "tarflow: interrupted" in done.stderr


def test_a_text_given_as_images_is_told_what_images_are(tarflow: Cli) -> None:
    Path("README.md").write_text("words")
    words = "'README.md' holds no images; expected a picture, a folder of pictures, or an array saved with numpy.save"
    refused(tarflow("likelihood", DEMO, "README.md"), USAGE, words)


def test_a_token_file_that_cannot_be_read_is_named_once(cli: Cli) -> None:
    message = refused(cli("serve", DEMO, "--token-file", "none.txt"), USAGE, "No such file or directory")
    assert message.count("none.txt") == 1
    assert "Errno" not in message


def test_a_broken_manifest_is_to_be_exported_again_where_it_is(bundle: Exported, tarflow: Cli) -> None:
    shutil.copytree(bundle("uncond"), "broken")
    Path("broken/manifest.json").write_text("{")
    refused(tarflow("inspect", "broken"), ARTIFACT, "tarflow export CHECKPOINT -o broken --force")


def test_inspect_counts_the_files_that_export_wrote(bundle: Exported, tarflow: Cli) -> None:
    folder = bundle("uncond")
    count = len([path for path in folder.iterdir() if path.is_file()])
    assert f"{count}, " in next(line for line in tarflow("inspect", folder).stdout.splitlines() if "  files" in line)
