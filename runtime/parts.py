"""Forward and gradient graphs on more images than are computed at once: part by part, each padded to what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Branches, Labels, pad_rows
from .manifest import ModelShape
from .ports import inputs

Feeds = dict[str, NDArray[Any]]


def forward_feeds(config: ModelShape, x: Array, branches: Branches) -> Feeds:
    """What a forward graph reads."""
    labels = classes(config, branches.labels)
    return {"x": x, "labels": labels, "mix": branches.mix, "inverse_temperature": branches.inverse_temperature}


def gradient_feeds(config: ModelShape, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Feeds:
    """What a gradient graph reads."""
    return {"x": x, "labels": classes(config, labels[None]), "grad_z": grad_z, "grad_log_det": grad_log_det}


def classes(config: ModelShape, labels: Labels) -> Labels:
    """Labels as the graphs take them: the null class comes after the last."""
    return np.where(labels < 0, config.classes, labels)


def in_parts(
    config: ModelShape, kind: str, feeds: Feeds, sizes: tuple[int, int], run: Callable[[Feeds], list[Array]]
) -> list[Array]:
    """A graph's outputs for all images of ``feeds``, run on (least, most) of them at a time."""
    least, most = sizes
    axes = {port.name: port.axes.index("batch") for port in inputs(config, kind) if "batch" in port.axes}
    found = []
    for start in range(0, len(feeds["x"]), most):
        rows = slice(start, start + most)
        part = {
            name: pad_rows(array[(slice(None),) * axes[name] + (rows,)], least, axes[name]) if name in axes else array
            for name, array in feeds.items()
        }
        count = len(feeds["x"][rows])
        found.append([output[:count] for output in run(part)])
    return [np.concatenate(outputs) for outputs in zip(*found, strict=True)]
