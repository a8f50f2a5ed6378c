"""What commands say with --json, and the files they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.bits.entries import Found, digest, files, keys, keys_and_values, under

ROOT = Path(__file__).parent.parent.parent
DRAWING = ("generate", "demo", "--labels", "0-9", "--guidance", 1, "--seed", 4)
SHARDS = (*DRAWING, "--n", 75, "--first-sample", 5, "--shard-size", 16)
TINY = ("--width", 64, "--blocks", 2, "--layers", 1, "--batch-size", 16, "--threads", 1)
OFTEN = ("--log-every", 1, "--evaluate-every", 2, "--sample-every", 2, "--save-every", 2, "--samples", 20)
COMMANDS: dict[str, tuple[object, ...]] = {
    "generate": (*DRAWING, "--n", 9, "-o", "drawn.png", "--save", "drawn.npy"),
    "generate, 1 thread": (*DRAWING, "--n", 9, "--reproducible", "--threads", 1, "-o", "single.png"),
    "generate, memory": (*DRAWING, "--n", 9, "--decode", "fast", "--memory", "1GiB", "-o", "bounded.png"),
    "likelihood": ("likelihood", "demo", "images.npy", "--labels", 3, "--seed", 1, "--save", "likelihood.npz"),
    "denoise": ("denoise", "demo", "images.npy", "--save", "denoised.npy", "-o", "denoised.png"),
    "evaluate": ("evaluate", "demo", "--n", 100, "--resamples", 5, "--save-stats", "statistics.npz"),
    "report": ("report", "demo", "--n", 20, "--guidance", 1),
    "inspect": ("inspect", "demo"),
    "verify": ("verify", "vp-fp32"),
    "bisect": ("bisect", "vp-fp32"),
    "package": ("package", "demo", "--triton", "models"),
    "train": ("train", "--steps", 5, *TINY, *OFTEN, "--out", "train"),
}
MEASURING = {"doctor": ("doctor",), "bench": ("bench", "demo", "--batch", 2, "--repeats", 1)}


def command(work: Path, *words: object) -> dict[str, Any]:
    """The JSON document of a command that runs in ``work``, with this checkout's code."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [sys.executable, "-m", "tarflow.cli.main", *map(str, words), "--json"]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"'{' '.join(line[2:])}' ended with {done.returncode}:\n{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def commands(work: Path) -> Found:
    """Run all, in ``work``, where the bundles are."""
    np.save(work / "images.npy", np.random.default_rng(8).integers(0, 256, (6, 1, 8, 8)).astype(np.uint8))
    for name, words in COMMANDS.items():
        yield from under(name, keys_and_values(command(work, *words)))
    for path in sorted(path for path in work.iterdir() if path.suffix in (".png", ".npy", ".npz")):
        yield path.name, digest(path.read_bytes())
    yield from under("train", files(work / "train"))
    for layout in ("npy", "safetensors", "png", "tar"):
        for workers in (1, 2):
            name = f"shards of {layout}, {workers} workers"
            words = (*SHARDS, "--format", layout, "--workers", workers, "--out", name)
            yield from under(f"{name}, said", keys_and_values(command(work, *words)))
            yield from under(name, files(work / name))
    for name, words in MEASURING.items():
        yield from under(f"keys of {name}", keys(command(work, *words)))
