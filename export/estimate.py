"""What an export will write and take, without doing it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tarflow.class_names import class_names_of
from tarflow.config import Config, Hints

from ..quality.parity import SAMPLES
from ..runtime.bundle import FUSED, GOLDEN, MANIFEST, PARITY, RESIDENT, WEIGHTS
from ..runtime.hub import checkpoint_at
from .comparison import open_checkpoint
from .fused import fits
from .pipeline import bundle_name, graph_name
from .precision import precision_named
from .trace import shape_of
from .weights import weights_size

_GRAPHS = {"step": (5, 5), "forward": (6, 4), "gradient": (6, 8), RESIDENT: (8, 5)}  # KiB: each, per layer; measured
_FUSED = {FUSED[1]: (2, 4), FUSED[2]: (4, 4)}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an export will write and take. Sizes in bytes; the time is for a two-core machine.
    ``noise_from`` says where the training noise was read.
    """

    name: str
    config: Config
    precision: str
    files: dict[str, int]
    peak_memory: int
    seconds: float
    noise_from: str


def estimate(checkpoint: str | os.PathLike[str], engine: str = "fp32", hints: Hints | None = None) -> Estimate:
    """What :func:`~.pipeline.export` would do. Raises what it raises before it writes."""
    precision = precision_named(engine)
    checkpoint = checkpoint_at(checkpoint)
    model = open_checkpoint(checkpoint, hints)
    config = model.config
    class_names_of(checkpoint, config.classes, hints)
    graphs = _GRAPHS | (_FUSED if precision.fused and fits(shape_of(config)) else {})
    mask = config.tokens**2 if config.tokens <= 512 else 0  # larger ones the exporter leaves to be computed
    files = {
        WEIGHTS: weights_size(model, precision) + 4096,
        GOLDEN: SAMPLES * config.tokens * config.patch_dim * 12 + 400,
        MANIFEST: 2048 + 400 * config.blocks * len(graphs),
        PARITY: 1024 + 100 * config.blocks,
    }
    for k in range(config.blocks):
        for kind, (fixed, per_layer) in graphs.items():
            masks = kind != "step" and kind not in _FUSED
            files[graph_name(k, kind)] = (fixed + per_layer * config.layers) * 1024 + masks * mask
    full = sum(p.numel() * 4 for p in model.parameters())
    return Estimate(
        name=bundle_name(checkpoint),
        config=config,
        precision=precision.name,
        files=files,
        peak_memory=int(full * (1 + 3 / config.blocks) + (700 << 20)),
        seconds=10 + (1 + min(config.blocks, 2)) * (3 + 2 * config.layers) + 5e-8 * full,
        noise_from=model.noise_from,
    )
