"""What is damaged: files as tarflow writes them, how each is read, and how its hashes are made right again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.torture.commands import PRIORED, TINY, bundle_of, line, run, save
from bench.torture.mutations import (
    Dice,
    absurd_array,
    absurd_json,
    absurd_tensors,
    absurd_zip,
    cut,
    flipped,
    in_zip,
    tensors_head,
    with_header,
)
from bench.torture.scenes import digests
from tarflow import checkpoint
from tarflow.cli.console import parse_labels, read_array
from tarflow.cli.images import as_trained_on, read_images
from tarflow.cli.main import app
from tarflow.config import Hints
from tarflow.export.estimate import estimate
from tarflow.runtime.bundle import GOLDEN, MANIFEST, WEIGHTS
from tarflow.runtime.flow import Flow
from tarflow.runtime.plan import FOLDER
from tarflow.shards.record import RECORDS

Read = Callable[[Path], Any]  # a folder -> what was read from it, to be compared with what should be
Make = Callable[[Path], list[str]]  # fills a folder; the names of the files to damage
Absurd = Callable[[bytes, Dice], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file. ``read`` does with it what commands do.

    ``mend`` makes right, after damage, what else speaks of the file. ``guarded`` says that without that any damage must
    be noticed, or change nothing; elsewhere a file may well say something else now. ``head`` is where the part ends
    that says what the rest is; ``inside`` damages what the file's own checksums speak for, and makes those right.
    """

    name: str
    make: Make
    read: Read
    absurd: Absurd | None = None
    mend: Callable[[Path, str], None] | None = None
    guarded: bool = False
    head: Callable[[bytes], int] = lambda content: len(content)
    inside: Absurd | None = None  # damage inside checksums of the file's own


# --- a bundle ------------------------------------------------------------------------------------------------------


def sampled(folder: Path) -> Any:
    """What is drawn from a bundle, denoised and certified."""
    flow = Flow.open(folder / "bundle", threads=1)
    return np.asarray(flow.sample(2, labels=[0, 1], certify=True))


def described(folder: Path) -> Any:
    """What ``tarflow inspect`` says; of what is drawn there must not be more."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        app(["inspect", str(folder / "bundle")], standalone_mode=False)
    return said.getvalue()


def described_and_sampled(folder: Path) -> Any:
    described(folder)
    return sampled(folder)


def _bundle(*names: str) -> Make:
    def make(folder: Path) -> list[str]:
        bundle_of(folder, 1, config=PRIORED, check=True)
        return [f"bundle/{name}" for name in names]

    return make


def _rehash(folder: Path, name: str) -> None:
    """The manifest's word on a file that was damaged."""
    path = folder / "bundle" / MANIFEST
    manifest, content = json.loads(path.read_bytes()), (folder / name).read_bytes()
    manifest["files"][Path(name).name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    path.write_text(json.dumps(manifest))


def _agree(folder: Path, name: str) -> None:
    """The weights' word on a configuration that was damaged in the manifest."""
    try:
        manifest = json.loads((folder / name).read_bytes())
        config = json.dumps(manifest["config"])
        path = folder / "bundle" / WEIGHTS
        content = path.read_bytes()
        header = json.loads(content[8 : tensors_head(content)])
        header["__metadata__"]["tarflow.config"] = config
        path.write_bytes(with_header(content, json.dumps(header).encode()))
        size = path.stat().st_size
        manifest["files"][WEIGHTS] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": size}
        (folder / name).write_text(json.dumps(manifest))
    except (ValueError, TypeError, KeyError, RecursionError):  # it is no manifest any more
        return


def verified(folder: Path) -> Any:
    """What the golden pairs say."""
    from tarflow.quality.parity import verify_golden

    return not verify_golden(Flow.open(folder / "bundle", threads=1)).failures()


# --- beside a bundle ------------------------------------------------------------------------------------------------


def _plan(folder: Path) -> list[str]:
    bundle = bundle_of(folder, 1)
    run(line("calibrate", bundle.folder, "--batch", 1, "--samples", 1, "--threads", 1))
    (path,) = (bundle.folder / FOLDER).iterdir()
    blocks = {"windows": [2], "passes": [2], "seconds": [0.1], "serial_seconds": [0.2], "errors": [0.0]}
    rows = [{"rows": 2, **blocks}, {"rows": 4, **blocks, "branches": 2}, {"rows": 64, **blocks, "lanes": 2}]
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"modes": {"exact": rows, "fast": rows}}))
    return [f"bundle/{FOLDER}/{path.name}"]


def planned(folder: Path) -> Any:
    """A plan decides speed alone: samples agree to what parallel decoding may differ by."""
    flow = Flow.open(folder / "bundle", threads=1)
    return np.round(np.asarray(flow.sample(4, labels=[0, 1, 0, 1])), 3) + 0.0


def _engines(folder: Path) -> list[str]:
    bundle = bundle_of(folder, 1)
    engine = {
        "block": 0, "kind": "step", "graph": "block_00.resident.onnx", "key": "a" * 64, "sha256": "b" * 64, "size": 1,
        "seconds": 1, "asked": "fp32", "built": "fp32", "attested": "network", "parity": {"rms": 1e-6, "max": 1e-5},
    }  # fmt: skip
    kinds = ("step", "forward", "gradient")
    profile = {"branches": 1, "batch": [1, 8, 64], "window": [1, 1, 1]}
    record = {
        "format": "tarflow-engines", "schema": 1, "bundle": bundle.hash, "precision": "fp32", "package": "tensorrt",
        "version": "11.4.0", "version_compatible": False, "strip_weights": False, "level": None,
        "target": {"gpu": None, "capabilities": ["8.9"]}, "profiles": {kind: [profile] for kind in kinds},
        "engines": {f"block_00.{kind}.engine": engine | {"kind": kind} for kind in kinds},
    }  # fmt: skip
    place = bundle.folder / "engines" / "any-tensorrt-fp32"
    place.mkdir(parents=True)
    (place / "engines.json").write_text(json.dumps(record))
    assert "fp32 for" in described(folder), "the record is not read"
    return ["bundle/engines/any-tensorrt-fp32/engines.json"]


# --- shards --------------------------------------------------------------------------------------------------------


def _generate(folder: Path) -> list[str]:
    shards = ("--n", 32, "--shard-size", 16, "--labels", "0-1", "--threads", 1, "--out", folder / "shards", "--json")
    return ["generate", str(folder / "bundle"), *map(str, shards)]


def drawn(folder: Path) -> Any:
    """The shards of a job, after the same command again: what a record does not vouch for is drawn again."""
    app(_generate(folder), standalone_mode=False)
    return {name: digest for name, digest in digests(folder / "shards").items() if name.endswith(".npy")}


def _shards(folder: Path) -> list[str]:
    bundle_of(folder, 1)
    run(line(*_generate(folder)))
    return ["shards/job.json", "shards/index.json", f"shards/{RECORDS}/shard-000000.json"]


# --- arrays ---------------------------------------------------------------------------------------------------------


def _arrays(folder: Path) -> list[str]:
    bundle_of(folder, 1)
    dice = np.random.default_rng(0)
    np.save(folder / "noise.npy", dice.standard_normal((2, TINY.tokens, TINY.patch_dim)).astype(np.float32))
    np.save(folder / "images.npy", dice.integers(0, 256, (2, 1, 8, 8)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(2))
    return ["noise.npy", "images.npy", "labels.npy"]


def arrays_used(folder: Path) -> Any:
    """Noise inverted, and images encoded, both under labels."""
    flow = Flow.open(folder / "bundle", threads=1)
    labels = parse_labels(str(folder / "labels.npy"), 0, 2)
    samples = flow.sample(noise=read_array(folder / "noise.npy", "noise"), labels=labels)
    stored = read_images(folder / "images.npy", flow.config, None).pixels
    bits = flow.bits_per_dim(as_trained_on(flow, stored, 0), labels)
    return [np.asarray(samples), bits]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _checkpoint(suffix: str, zipped: bool = True) -> Make:
    def make(folder: Path) -> list[str]:
        path = save(folder, 1, suffix)
        if not zipped:
            state = torch.load(path, weights_only=True)
            torch.save(state, path, _use_new_zipfile_serialization=False)
        return [path.name]

    return make


def loaded(folder: Path) -> Any:
    """A model's weights, and what exporting it would take."""
    (path,) = folder.glob("tiny1_*")
    model = checkpoint.load(path, Hints(4, 0.1))
    estimate(path, hints=Hints(4, 0.1))
    return [weights.numpy() for weights in model.state_dict().values()]


TARGETS = (
    Target("manifest", _bundle(MANIFEST), described_and_sampled, absurd_json, _agree),
    Target("weights", _bundle(WEIGHTS), sampled, absurd_tensors, _rehash, True, tensors_head),
    Target("golden pairs", _bundle(GOLDEN), verified, absurd_tensors, _rehash, True, tensors_head),
    Target(
        "graphs",
        _bundle(*(f"block_00.{kind}.onnx" for kind in ("step", "forward", "gradient"))),
        sampled,
        mend=_rehash,
        guarded=True,
    ),
    Target("plan", _plan, planned, absurd_json),
    Target("engines.json", _engines, described, absurd_json),
    Target("job and records", _shards, drawn, absurd_json, guarded=True),
    Target("arrays (.npy)", _arrays, arrays_used, absurd_array, head=lambda content: 128),
    Target(
        "checkpoint (.pth)",
        _checkpoint(".pth"),
        loaded,
        absurd_zip,
        guarded=True,
        inside=lambda content, dice: in_zip(content, dice, flipped if dice.random() < 0.5 else cut),
    ),
    Target("checkpoint (.pth, before zip)", _checkpoint(".pth", zipped=False), loaded, head=lambda content: 6000),
    Target("checkpoint (.safetensors)", _checkpoint(".safetensors"), loaded, absurd_tensors, head=tensors_head),
)
