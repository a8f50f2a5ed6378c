"""A drawing that is watched: events from noise, block by block, to the images that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ..runtime.flow import REPRODUCIBLE_TILE, Flow, Guidance, Preview, Progress, Report
from ..runtime.image import unpatchify
from .picture import columns_of, sheet

Tell = Callable[[str, dict[str, Any]], None]  # an event's name and data; an exception it raises cancels


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be drawn: ``labels`` one a sample, or None."""

    n: int
    seed: int
    first_sample: int
    labels: tuple[int, ...] | None
    guidance: Guidance
    edition: str
    decode: str | None = None
    tolerance: float | None = None

    def address(self, i: int) -> str:
        """Where sample ``i`` of these can be had alone, for good."""
        query = [f"edition={self.edition}"]
        if self.labels is not None and self.labels[i] >= 0:
            query.append(f"label={self.labels[i]}")
        if self.guidance.scale:
            query.append(f"guidance={self.guidance.scale!r}")
        if self.guidance.attention_temperature != 1:
            query.append(f"attention_temperature={self.guidance.attention_temperature!r}")
        return f"v1/samples/{self.seed}/{self.first_sample + i}.png?" + "&".join(query)


def draw(flow: Flow, wish: Wish, tell: Tell, progress: Callable[[Progress], None]) -> Report:
    """Draw as ``Flow.sample(reproducible=True, certify=True)`` does, telling ``start``, each ``block`` and ``done``.

    What is drawn is bitwise what :meth:`Wish.address` shows.
    """
    indices = range(wish.first_sample, wish.first_sample + wish.n)
    tiles = indices[-1] // REPRODUCIBLE_TILE - indices[0] // REPRODUCIBLE_TILE + 1
    of = tiles * flow.config.blocks
    done = count(1)
    tell("start", _start(flow, wish, indices, of))
    samples = flow.sample(
        wish.n,
        labels=wish.labels,
        guidance=wish.guidance,
        seed=wish.seed,
        first_sample=wish.first_sample,
        certify=True,
        reproducible=True,
        decode=wish.decode,
        tolerance=wish.tolerance,
        progress=progress,
        preview=lambda preview: tell("block", _block(preview, next(done), of)),
    )
    assert samples.report is not None
    tell("done", _done(samples.report, wish) | {"picture": sheet(samples)})
    return samples.report


def _start(flow: Flow, wish: Wish, indices: range, of: int) -> dict[str, Any]:
    config = flow.config
    noise = unpatchify(flow.noise(wish.seed, indices) * flow.deviation, config.patch_size, config.channels)
    blocks = [f"block {block}" for block in reversed(range(config.blocks))]
    return {
        "n": wish.n,
        "seed": wish.seed,
        "first_sample": wish.first_sample,
        "labels": wish.labels,
        "guidance": wish.guidance.scale,
        "states": ["noise", *blocks, *(["denoised"] if config.noise_std else [])],
        "of": of,
        "columns": columns_of(wish.n),
        "picture": sheet(noise),
    }


def _block(preview: Preview, done: int, of: int) -> dict[str, Any]:
    return {
        "block": preview.block,
        "first": preview.first,
        "count": len(preview.images),
        "done": done,
        "of": of,
        "seconds": preview.seconds,
        "columns": columns_of(len(preview.images)),
        "picture": sheet(preview.images),
    }


def _done(report: Report, wish: Wish) -> dict[str, Any]:
    assert report.certificate is not None
    return {
        "certificate": [float(error) if math.isfinite(error) else None for error in np.asarray(report.certificate)],
        "nonfinite": report.nonfinite,
        "seconds": report.seconds,
        "certificate_seconds": report.certificate_seconds,
        "denoise_seconds": report.denoise_seconds,
        "backend": report.backend,
        "level": report.level,
        "links": [wish.address(i) for i in range(wish.n)],
    }
