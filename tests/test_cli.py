"""The command line from outside: one JSON document, quiet pipes, files that say where they come from."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarflow.cli.console import parse_labels
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow, Guidance

from .conftest import DEMO, Cli, largest


def test_generate_writes_what_the_library_draws_and_says_where_from(cli: Cli, tmp_path: Path) -> None:
    done = cli(
        "generate", "--n", 12, "--labels", "0-9", "--guidance", 1, "--seed", 3, "--first-sample", 5, "--json",
        "--save", "s.npy", "-o", "grid.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    flow = Flow.open(DEMO)
    labels = (np.arange(12) + 5) % 10
    expected = flow.sample(12, labels=labels, guidance=Guidance(1.0), seed=3, first_sample=5)
    assert largest(np.load(tmp_path / "s.npy"), expected) < 1e-5
    assert report["bundle_hash"] == flow.bundle.hash
    assert report["certificate"]["max"] < 1e-4
    assert len(report["certificate"]["per_sample"]) == 12
    with Image.open(tmp_path / "grid.png") as picture:
        text = picture.text  # type: ignore[attr-defined]  # of PNG images only
    assert (text["seed"], text["sample_indices"], text["bundle_hash"]) == ("3", "5-16", flow.bundle.hash)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "s.npy"]


def test_generate_takes_the_bundle_in_the_working_folder_before_the_demo(
    cli: Cli, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tarflow-bundle").symlink_to(bundle("uncond"))
    done = cli("generate", "--n", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == "tarflow-bundle"
    assert (tmp_path / "samples.png").exists()


def test_export_without_a_checkpoint_exports_the_demo_and_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("export", "--dry-run", "--json", "--engine", "fp16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["bundle"] == "tarflow-bundle"
    assert planned["precision"] == "fp16"
    assert planned["config"]["classes"] == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["inspect"], ["doctor"], ["bench", "--batch", "1", "--repeats", "1"], ["verify", DEMO]]
)
def test_json_is_one_document_on_stdout(cli: Cli, command: list[object], tmp_path: Path) -> None:
    done = cli(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
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
    documents = []
    for source in ("in", "in.npy"):
        done = cli("likelihood", DEMO, source, "--labels", 3, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        documents.append(json.loads(done.stdout))
    assert documents[0]["bits_per_dim"] == documents[1]["bits_per_dim"]
    assert documents[0]["names"] == ["0.png", "1.png", "2.png"]
    done = cli("denoise", DEMO, "in", "--save", "out.npy", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = Flow.open(DEMO).denoise(pixels[:, None].astype(np.float32) / 127.5 - 1)
    assert largest(np.load(tmp_path / "out.npy"), expected) < 1e-5


def test_help_comes_up_in_a_third_of_a_second() -> None:
    command = [sys.executable, "-m", "tarflow.cli.main", "--help"]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("text", "labels"),
    [("3", [3, 3, 3, 3]), ("0-2", [1, 2, 0, 1]), ("5,7-8", [7, 8, 5, 7]), ("-1", [-1, -1, -1, -1]), (None, None)],
)
def test_labels_are_dealt_out_by_sample_index(text: str | None, labels: list[int] | None) -> None:
    found = parse_labels(text, first=1, count=4)
    assert (found is None) if labels is None else (found is not None and found.tolist() == labels)


@pytest.mark.parametrize("text", ["", "cat", "3-1", "1,,2", "0-99999999999", "1.5", "--"])
def test_labels_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="labels"):
        parse_labels(text, 0, 4)
