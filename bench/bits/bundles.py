"""The bundles that are drawn from: the demo and the golden cases, exported by this checkout."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.bits.commands import ROOT, command
from bench.bits.entries import Found, files, keys, keys_and_values, under

DEMO, GOLDEN = ROOT / "tarflow" / "demo", ROOT / "tests" / "golden"
EXPORTS = ("demo-fp16", "demo-int8", "cond-fp32", "uncond-fp32", "vp-fp32", "vp-bf16")  # checkpoint and precision
DRAWN = ("demo", *EXPORTS[:-1])  # CPUs draw no bf16
GRAPHS = ("step", "forward", "gradient", "resident")


def golden(name: str) -> Path:
    """A golden case's checkpoint."""
    return next((GOLDEN / name).glob("*.pth"))


def exported(work: Path) -> Found:
    """Exports into ``work``, two at a time: the files, and what the command says. Leaves the bundles reduced."""
    shutil.copytree(DEMO, work / "demo", ignore=shutil.ignore_patterns("plans"))

    def export(name: str) -> dict[str, Any]:
        model, precision = name.split("-")
        source = "demo" if model == "demo" else golden(model)
        check = "--verify" if name == "vp-fp32" else "--no-verify"  # one is enough for what it says
        return command(work, "export", source, "-o", name, "--engine", precision, check, "--no-build")

    with ThreadPoolExecutor(2) as pool:
        for name, document in zip(EXPORTS, pool.map(export, EXPORTS), strict=True):
            yield from under(f"{name}, said", keys_and_values(document))
    for name in ("demo", *EXPORTS):
        yield from under(name, files(work / name))
        reduce(work / name)


def reduce(folder: Path) -> None:
    """Leave of a bundle what is drawn from: other files and cards do not change what carries the bundle's hash."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for block in manifest["blocks"]:
        block["graphs"] = {kind: block["graphs"][kind] for kind in GRAPHS}
    graphs = {name for block in manifest["blocks"] for name in block["graphs"].values()}
    kept = sorted({"weights.safetensors", "golden.safetensors", *graphs})
    manifest |= {"exporter": {}, "parity": {}, "files": {name: manifest["files"][name] for name in kept}}
    for name in {path.name for path in folder.iterdir()}.difference(kept):
        (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def planned(work: Path) -> Found:
    """A copy of the demo that follows a plan: not the one that calibration measures, which is never the same."""
    shutil.copytree(work / "demo", work / "demo-planned")
    said = command(work, "calibrate", "demo-planned", "--batch", "1,8", "--samples", 1)
    yield from under("keys of calibrate", keys(said))
    times = {"seconds": [1.0] * 4, "serial_seconds": [2.0] * 4, "errors": [0.0] * 4}
    windows = {"windows": [1, 4, 8, 15], "passes": [15, 8, 6, 4], **times}
    rows = [{"rows": 4, **windows}, {"rows": 8, **windows, "branches": 2}, {"rows": 64, **windows, "lanes": 2}]
    plan = {"format": "tarflow-plan", "schema": 1, "modes": {"exact": rows, "fast": rows}}
    (work / said["plan"]).write_text(json.dumps(plan | {key: said[key] for key in ("bundle", "machine", "samples")}))
