"""Compare a backend with an oracle on the same noise: error per block, of samples, of likelihood; the certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Array, Backend, Branches, Decoding
from ..runtime.bundle import GOLDEN, Bundle
from ..runtime.decode import serial
from ..runtime.errors import BundleError, Remedy
from ..runtime.flow import Flow, Guidance
from ..runtime.image import patchify, unpatchify
from ..runtime.inputs import AS_THEY_ARE
from ..runtime.manifest import AGAIN
from ..runtime.precision import PRECISIONS, Tolerance, native_tolerance
from .card import Card, Difference, Native

SAMPLES = 4
_GUIDANCE = Guidance(1.0, annealed=True, attention_temperature=0.7)  # uses all a graph's guidance has
_SWEEP_WINDOW = 128
_SERIAL_STEPS = 16  # the first of a sweep and the last, one position at a time
_SERIAL_LIMIT = 60.0  # seconds: longer serial decoding in PyTorch gives way to a sweep
_MEMORY_SPEED = 5e9  # bytes/s a PyTorch step reads weights with, for that estimate

Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the oracle makes of a few noises: the content of ``golden.safetensors``. ``images`` are not denoised."""

    noise: Array
    labels: NDArray[np.int64]
    images: Array
    denoised: Array | None
    states: tuple[Array, ...]  # input of each block's inverse, block 0's last, then the raw patches; not stored
    serial: bool  # decoded position by position; else encoded from the images

    def tensors(self) -> dict[str, NDArray[Any]]:
        stored: dict[str, NDArray[Any]] = {"noise": self.noise, "labels": self.labels, "images": self.images}
        return stored if self.denoised is None else {**stored, "denoised": self.denoised}

    def inverses(self) -> list[tuple[int, Array, Array]]:
        """Each block, what its inverse reads and what it makes of it, (B, T, D) both; the last block first."""
        last = len(self.states) - 2
        return [(last - place, z, x) for place, (z, x) in enumerate(pairwise(self.states))]


@dataclass(frozen=True, slots=True)
class Others:
    """Backends that decode a bundle otherwise, to be compared too: with its graphs for devices, ``fused`` with those
    for the CUDA provider, in float32; and the ``native`` engine, by precision.
    """

    resident: Backend | None = None
    fused: Backend | None = None
    native: Mapping[str, Backend] = field(default_factory=dict)


def make_pairs(oracle: Flow, parameters: int, watch: Watch = lambda stage: None) -> Pairs:
    """Noise, samples and denoised samples by the oracle: by decoding where that is quick, else by encoding images.

    Both give true pairs of a flow and its inverse; a serial decode of a large model in PyTorch takes an hour.
    """
    config = oracle.config
    decode = config.tokens * parameters * 4 / _MEMORY_SPEED < _SERIAL_LIMIT  # every step reads one block's weights
    count = SAMPLES if decode else 1
    labels = np.full(count, -1, np.int64)
    if config.classes:  # the last one stays the null class, which has weights of its own
        known = max(count - 1, 1)
        labels[:known] = np.arange(known) % config.classes
    plain = Branches.plain(labels, config.tokens)
    noise = oracle.noise(0, range(count))
    deviation = oracle.deviation
    states: list[Array]
    if decode:
        states = [noise * deviation]
        for block in reversed(range(config.blocks)):
            watch(f"PyTorch decodes block {block}")
            states.append(serial(oracle.backend.decoding(block, states[-1], plain), config.tokens))
        images = unpatchify(states[-1], config.patch_size, config.channels)
    else:
        images = np.tanh(unpatchify(noise, config.patch_size, config.channels)).astype(np.float32)
        watch("PyTorch encodes")
        encoded, _ = oracle.chain.encode(patchify(images, config.patch_size), plain)
        states = encoded[::-1]
        noise = (states[0] / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    watch("PyTorch denoises")
    denoised = oracle.denoise(images, labels, range=AS_THEY_ARE) if config.noise_std else None
    return Pairs(noise, labels, images, denoised, tuple(states), decode)


def verify(
    flow: Flow,
    oracle: Flow,
    pairs: Pairs,
    watch: Watch = lambda stage: None,
    others: Others = Others(),
) -> Card:
    """The parity card of ``flow`` against ``oracle``."""
    blocks = _blocks(flow, pairs, watch)
    plain = Branches.plain(pairs.labels, flow.config.tokens)
    branches = _GUIDANCE.branches(flow.config.tokens, pairs.labels)
    watch("verify guidance")
    inverses = _guided_inverses(oracle if pairs.serial else flow, pairs, branches)
    guided = _worst(flow.backend, inverses, branches)
    resident = cuda = cuda_guided = None
    if others.resident is not None:
        watch("verify resident steps")
        resident = _worst(others.resident, pairs.inverses(), plain)
    if others.fused is not None:
        watch("verify steps for CUDA")
        cuda = _worst(others.fused, pairs.inverses(), plain)
        cuda_guided = _worst(others.fused, inverses, branches)
    watch("verify native steps")
    native = {
        precision: _native_drawn(flow, precision, backend, pairs)
        if pairs.serial
        else Native(_worst(backend, pairs.inverses(), plain), None, _native_tolerance(flow, precision))
        for precision, backend in others.native.items()
    }
    watch("verify likelihood")
    bits = flow.bits_per_dim(pairs.images, pairs.labels, AS_THEY_ARE).astype(np.float64)
    shift = np.abs(bits - oracle.bits_per_dim(pairs.images, pairs.labels, AS_THEY_ARE)).max()
    sample = None
    if pairs.serial:
        watch("verify samples")
        sample, certificate = _drawn(flow, pairs.noise, pairs.labels, pairs.images)
    else:  # no sample was drawn: the certificate is that the oracle's images encode to the oracle's latents
        latent, _ = flow.encode(pairs.images, pairs.labels, AS_THEY_ARE)
        certificate = float(np.abs(latent - pairs.states[0]).max())
    if pairs.denoised is not None:
        watch("verify denoising")
    return Card(
        oracle=oracle.backend.description,
        backend=flow.backend.description,
        method="serial decode" if pairs.serial else "fixed-point sweep of oracle patches",
        samples=len(pairs.noise),
        tolerance=PRECISIONS[flow.bundle.manifest.precision].tolerance,
        blocks=blocks,
        guided=guided,
        bits_per_dim_shift=float(shift),
        resident=resident,
        cuda=cuda,
        cuda_guided=cuda_guided,
        native=native,
        sample=sample,
        certificate=certificate,
        denoised=_denoised(flow, pairs.images, pairs.labels, pairs.denoised),
    )


def stored_pairs(bundle: Bundle) -> Pairs:
    """The content of a bundle's ``golden.safetensors``. Raises BundleError for pairs that are none of its model."""
    config, found = bundle.manifest.config, bundle.tensors(GOLDEN)
    count = len(np.atleast_1d(found["labels"])) if "labels" in found else 0
    shapes = {"labels": (count,), "noise": (count, config.tokens, config.patch_dim), "images": (count, *config.image)}
    if "denoised" in found:
        shapes["denoised"] = shapes["images"]
    for name, shape in shapes.items():
        expected = (np.dtype(np.int64 if name == "labels" else np.float32), shape)
        if not count or name not in found or (found[name].dtype, found[name].shape) != expected:
            raise BundleError(
                f"'{bundle.folder / GOLDEN}' holds no `{name}` that this model can have made: {AGAIN}",
                remedy=Remedy("export", {"folder": bundle.folder, "force": True}),
            )
    return Pairs(found["noise"], found["labels"], found["images"], found.get("denoised"), states=(), serial=True)


def verify_golden(flow: Flow, native: Mapping[str, Backend] | None = None) -> Card:
    """The part of the card that needs no PyTorch: the bundle's golden pairs, and the certificate of their samples, of
    the ``native`` engine too.
    """
    pairs = stored_pairs(flow.bundle)
    labels, images = pairs.labels, pairs.images
    sample, certificate = _drawn(flow, pairs.noise, labels, images)
    return Card(
        oracle="golden pairs made by PyTorch",
        backend=flow.backend.description,
        method="serial decode",
        samples=len(labels),
        tolerance=PRECISIONS[flow.bundle.manifest.precision].tolerance,
        native={name: _native_drawn(flow, name, backend, pairs) for name, backend in (native or {}).items()},
        sample=sample,
        certificate=certificate,
        denoised=_denoised(flow, images, labels, pairs.denoised),
    )


def _blocks(flow: Flow, pairs: Pairs, watch: Watch) -> dict[int, Difference]:
    """Each block's inverse alone, position by position; or, much faster, whether x is its graphs' fixed point."""
    plain, found = Branches.plain(pairs.labels, flow.config.tokens), {}
    for block, z, x in pairs.inverses():
        watch(f"verify block {block}")
        decoding = flow.backend.decoding(block, z, plain)
        patches = serial(decoding, flow.config.tokens) if pairs.serial else _sweep(decoding, x)
        found[block] = Difference.between(patches, x)
    return found


def _guided_inverses(judge: Flow, pairs: Pairs, branches: Branches) -> list[tuple[int, Array, Array]]:
    """As :meth:`Pairs.inverses`, guided; made once for all that are compared. In PyTorch it is a walk: too slow for a
    large model, whose own forward graphs then judge.
    """
    return [(block, judge.backend.forward(block, x, branches)[0], x) for block, _, x in pairs.inverses()]


def _worst(backend: Backend, inverses: Iterable[tuple[int, Array, Array]], branches: Branches) -> Difference:
    """The difference of the block whose sweep is furthest off."""
    found = (Difference.between(_sweep(backend.decoding(block, z, branches), x), x) for block, z, x in inverses)
    return max(found, key=lambda difference: difference.rms)


def _drawn(flow: Flow, noise: Array, labels: NDArray[np.int64], images: Array) -> tuple[Difference, float]:
    """What the flow decodes noise to, against images; and the largest round-trip error."""
    found = flow.sample(noise=noise, labels=labels, denoise=False, certify=True)
    assert found.report.certificate is not None
    return Difference.between(found, images), float(found.report.certificate.max())


def _native_drawn(flow: Flow, precision: str, backend: Backend, pairs: Pairs) -> Native:
    """What the native engine decodes the noise to, encoded again by the flow."""
    drawn = Flow(flow.bundle, backend).sample(noise=pairs.noise, labels=pairs.labels, denoise=False, decode="serial")
    certificate = float(flow.certify(drawn, pairs.noise, pairs.labels).max())
    return Native(Difference.between(drawn, pairs.images), certificate, _native_tolerance(flow, precision))


def _native_tolerance(flow: Flow, precision: str) -> Tolerance:
    return native_tolerance(flow.bundle.manifest.precision, precision)


def _denoised(flow: Flow, images: Array, labels: NDArray[np.int64], expected: Array | None) -> Difference | None:
    return None if expected is None else Difference.between(flow.denoise(images, labels, range=AS_THEY_ARE), expected)


def _sweep(decoding: Decoding, x: Array) -> Array:
    """What the steps make of z when every window reads the true patches x: x again, if the graph is right."""
    decoding.guess(x)
    last = x.shape[1] - 1
    first = min(_SERIAL_STEPS, last)
    rest = max(first, last - _SERIAL_STEPS)
    starts = [*range(first), *range(first, rest, _SWEEP_WINDOW), *range(rest, last)]
    for start, stop in pairwise([*starts, last]):
        decoding.step(start, stop - start)
    return decoding.patches()
