"""What is timed on a GPU: the two largest published shapes, in fp16 with random weights that pack small."""

from __future__ import annotations

import importlib.util
import tempfile
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tarflow.config import Config

NEEDED = ("onnx", "onnx_ir", "onnxscript")


def shapes(quick: bool) -> dict[str, Config]:
    """The models by name: two blocks, one of each direction; published ones have eight."""
    from tarflow.config import Config

    if quick:
        return {"tiny": Config(8, 3, 2, width=64, blocks=2, layers=1, classes=4, noise_std=0.1)}
    return {
        "2-768-8-8": Config(64, 3, 2, width=768, blocks=2, layers=8, classes=1000, noise_std=0.05),
        "4-1024-8-8": Config(64, 3, 4, width=1024, blocks=2, layers=8, classes=1000, noise_std=0.05),
    }


def export_models(folder: Path, models: dict[str, Config], watch: Callable[[str], None]) -> None:
    """Export the models to ``folder``; those that are there already stay."""
    missing = absent(NEEDED)
    if missing:
        raise SystemExit(
            f"exporting needs {', '.join(missing)}, not to be found here: add wheels of them to --wheels, or export "
            "elsewhere, python -m bench.gpu --prepare DIR, and bring the folder: --bundles DIR"
        )
    from bench.weights import random_model, repeat
    from tarflow.checkpoint import save
    from tarflow.export.pipeline import export
    from tarflow.quality import parity

    folder.mkdir(parents=True, exist_ok=True)
    for name, config in models.items():
        if (folder / name / "manifest.json").exists():
            continue
        with tempfile.TemporaryDirectory() as place:
            checkpoint = Path(place) / f"{name}.safetensors"
            save(repeat(random_model(config)), checkpoint)
            watch(f"export {name}")
            with unittest.mock.patch.object(parity, "_SERIAL_LIMIT", 0.0):  # golden samples, which nothing reads here
                export(checkpoint, folder / name, "fp16", check=False, watch=watch)


def absent(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]
