"""What the runtime and PyTorch compute in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.bits.bundles import golden
from bench.bits.entries import Found, digest
from tarflow import checkpoint
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.samples import Preview, Progress

HUGE = 40.0  # guidance at which samples of the demo overflow; some do not when they are drawn again
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "serial": {"decode": "serial"},
    "exact": {"decode": "exact"},
    "fast": {"decode": "fast"},
    "tolerance": {"tolerance": 0.01},
}


def guidances(flow: Flow) -> dict[str, Guidance]:
    """What can guide a model: one without classes nothing but its own blunted attention."""
    found = {"temperature": Guidance(1.2, attention_temperature=0.7)}
    if flow.config.classes:
        found |= {"ab": Guidance(1.5), "b": Guidance(1.0, "b"), "annealed": Guidance(2.0, annealed=True)}
    if flow.config.classes and flow.config.nvp:
        found["a"] = Guidance(1.0, "a")
    return found


def ways(flow: Flow) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and arguments of :meth:`Flow.sample`."""
    few: dict[str, Any] = {"n": 5, "seed": 3}
    if flow.config.classes:
        few["labels"] = np.arange(5) % flow.config.classes
        yield "one class", {"n": 3, "labels": 1}
        yield "one of no class", {"n": 3, "labels": np.array([1, -1, 2])}
    for mode, how in MODES.items():
        yield mode, few | how
        yield f"{mode}, batches of 1", few | how | {"batch_size": 1}
        yield f"{mode}, batches of 3", few | how | {"batch_size": 3, "certify": True}
        yield f"{mode}, reproducible", how | {"n": 20, "first_sample": 13, "reproducible": True, "certify": True}
        yield f"{mode}, given noise", how | {"noise": flow.noise(9, range(4)), "denoise": False}
        for name, guidance in guidances(flow).items():
            yield f"{mode}, guided {name}", few | how | {"guidance": guidance, "certify": name == "ab"}
    yield "far seed and index", few | {"seed": 2**40 + 1, "first_sample": 2**33}
    yield "70, not denoised", {"n": 70, "denoise": False}
    yield "denoised", few | {"denoise": True}
    yield "denoised by half", few | {"denoise": 0.5}
    if flow.bundle.manifest.name == "digits":
        huge: dict[str, Any] = {"n": 16, "labels": np.arange(16) % 10, "guidance": Guidance(HUGE), "certify": True}
        yield "overflowing", huge
        yield "overflowing, redrawn", huge | {"redraw_nonfinite": True}
        yield "overflowing, redrawn, reproducible", huge | {"redraw_nonfinite": True, "reproducible": True}


def drawn(folder: Path) -> Found:
    """What the runtime draws from a bundle, what it is told meanwhile, and what it says of images."""
    flow = Flow.open(folder, "cpu")
    for name, arguments in ways(flow):
        samples = flow.sample(**arguments)
        report = samples.report
        assert report is not None
        told = [report.decoding, report.level, report.passes, report.nonfinite, report.redrawn]
        yield name, digest(np.asarray(samples))
        yield f"{name}: report", digest(json.dumps(told).encode(), np.asarray(report.certificate, np.float32))
    heard: list[bytes] = []

    def progress(event: Progress) -> None:
        heard.append(b"%d of %d, block %d at %d" % (event.done, event.total, event.block, event.position))

    def preview(event: Preview) -> None:
        heard.append(b"block %d from %d " % (event.block, event.first) + event.images.tobytes())

    flow.sample(5, batch_size=3, progress=progress, preview=preview)
    yield "progress and preview", digest(*heard)
    yield from _encoded(flow)


def _encoded(flow: Flow) -> Found:
    pixels = np.random.default_rng(7).integers(0, 256, (70, *flow.config.image)).astype(np.uint8)
    images = (pixels / np.float32(127.5) - 1).astype(np.float32)
    labels = {"no class": None, "one class": 0, "classes": np.arange(70) % 3 - 1}
    for name, classes in labels.items() if flow.config.classes else [("no class", None)]:
        latent, log_det = flow.encode(images, classes)
        yield f"latent, {name}", digest(latent)
        yield f"log-determinant, {name}", digest(log_det)
        yield f"bits per dimension, {name}", digest(flow.bits_per_dim(images, classes))
        yield f"log-likelihood, {name}", digest(flow.log_likelihood(images, classes))
        yield f"denoise, {name}", digest(flow.denoise(images, classes, 0.8))
    yield "dequantise", digest(flow.dequantise(pixels, seed=2, first_sample=5))
    yield "noise", digest(flow.noise(2**63 + 5, range(2**33, 2**33 + 4)))


def pytorch(work: Path) -> Found:
    """What the model computes, and the checkpoints it is saved as."""
    for name in ("cond", "uncond", "vp"):
        model = checkpoint.load(golden(name))
        config, dice = model.config, torch.Generator().manual_seed(5)
        labels = torch.arange(4) % config.classes if config.classes else None
        images = torch.randn(4, config.channels, config.image_size, config.image_size, generator=dice)
        noise = torch.randn(4, config.tokens, config.patch_dim, generator=dice)
        with torch.no_grad():
            latent, log_det = model.encode(images, labels)
            decoded = model.decode(noise, labels, 1.5 if config.classes else 0.0)
        yield f"{name}: encode", digest(latent.numpy(), log_det.numpy())
        yield f"{name}: decode", digest(decoded.numpy())
        yield f"{name}: denoise", digest(model.denoise(images, labels).detach().numpy())
        for suffix in (".pth", ".safetensors"):
            checkpoint.save(model, work / f"saved{suffix}")
            yield f"{name}{suffix}", digest((work / f"saved{suffix}").read_bytes())
