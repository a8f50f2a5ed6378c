"""A drawing that is watched: events from noise, block by block, to the images that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from ..runtime.backend import REPRODUCIBLE_TILE
from ..runtime.flow import Flow
from ..runtime.image import unpatchify
from ..runtime.request import Resolved
from ..runtime.samples import Preview, Progress, Report, Watch
from .picture import columns_of, sheet
from .protocol import json_numbers

Tell = Callable[[str, dict[str, Any]], None]  # an event's name and data; an exception it raises cancels


def draw(flow: Flow, request: Resolved, edition: str, tell: Tell, progress: Callable[[Progress], None]) -> Report:
    """Draw a request that is reproducible and certified, telling ``start``, each ``block`` and ``done``.

    What is drawn is bitwise what :func:`address` shows, as long as this ``edition`` is served.
    """
    last = request.first_sample + request.n - 1
    tiles = last // REPRODUCIBLE_TILE - request.first_sample // REPRODUCIBLE_TILE + 1
    of = tiles * flow.config.blocks
    done = count(1)
    tell("start", _start(flow, request, of))
    samples = flow.draw(request, watch=Watch(progress, lambda seen: tell("block", _block(seen, next(done), of))))
    links = {"links": [address(request, i, edition) for i in range(request.n)]}
    tell("done", _done(samples.report) | links | {"picture": sheet(samples)})
    return samples.report


def address(request: Resolved, i: int, edition: str) -> str:
    """Where sample ``i`` of a request can be had alone, for good."""
    query, guidance = [f"edition={edition}"], request.guidance
    label = request.labels[i] if request.labels else -1
    if label >= 0:
        query.append(f"label={label}")
    if guidance.scale:
        query.append(f"guidance={guidance.scale!r}")
    if guidance.attention_temperature != 1:
        query.append(f"attention_temperature={guidance.attention_temperature!r}")
    return f"v1/samples/{request.seed}/{request.first_sample + i}.png?" + "&".join(query)


def _start(flow: Flow, request: Resolved, of: int) -> dict[str, Any]:
    config, first = flow.config, request.first_sample
    noise = flow.noise(request.seed, range(first, first + request.n)) * flow.deviation
    blocks = [f"block {block}" for block in reversed(range(config.blocks))]
    return {
        "n": request.n,
        "seed": request.seed,
        "first_sample": first,
        "labels": request.labels,
        "guidance": request.guidance.scale,
        "states": ["noise", *blocks, *(["denoised"] if config.noise_std else [])],
        "of": of,
        "columns": columns_of(request.n),
        "picture": sheet(unpatchify(noise, config.patch_size, config.channels)),
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


def _done(report: Report) -> dict[str, Any]:
    assert report.certificate is not None
    assert report.log_prob is not None
    names = (
        "nonfinite",
        "suspects",
        "suspect_above",
        "seconds",
        "certificate_seconds",
        "denoise_seconds",
        "density",
        "backend",
        "level",
    )
    checked = {"certificate": json_numbers(report.certificate), "log_prob": json_numbers(report.log_prob)}
    return checked | {name: getattr(report, name) for name in names}
