"""Compare a backend with an oracle on the same noise: error per block, of samples, of likelihood; the certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Array, Backend, Branches, briefly
from ..runtime.bundle import GOLDEN, Bundle
from ..runtime.decode import serial
from ..runtime.errors import BundleError, CheckFailed, MachineError
from ..runtime.flow import Flow, Guidance
from ..runtime.image import patchify, unpatchify
from ..runtime.memory import Budget
from ..runtime.ort.backend import OrtBackend
from ..runtime.tensorrt.backend import open_tensorrt
from ..runtime.tensorrt.record import Record

SAMPLES = 4
# By precision: rms of patches and samples, shift of bits/dim, round-trip error; about ten times what is measured on
# trained models.
TOLERANCES = {
    "fp32": {"rms": 1e-4, "bits_per_dim": 1e-4, "certificate": 1e-2},
    "fp16": {"rms": 5e-3, "bits_per_dim": 5e-3, "certificate": 0.5},
    "bf16": {"rms": 5e-2, "bits_per_dim": 5e-2, "certificate": 5.0},
    "int8": {"rms": 5e-2, "bits_per_dim": 5e-2, "certificate": 5.0},
}
_GUIDANCE = Guidance(1.0, annealed=True, attention_temperature=0.7)  # uses all a graph's guidance has
_SWEEP_WINDOW = 128
_SERIAL_STEPS = 16  # the first steps of a sweep, one position at a time
_SERIAL_LIMIT = 60.0  # seconds: longer serial decoding in PyTorch gives way to a sweep
_MEMORY_SPEED = 5e9  # bytes/s a PyTorch step reads weights with, for that estimate


@dataclass(frozen=True, slots=True)
class Difference:
    """How far ``found`` is from ``expected``: cosine, ratio of norms, and quantiles of the absolute difference."""

    cosine: float
    norm_ratio: float
    rms: float
    p99: float
    max: float

    @classmethod
    def between(cls, found: NDArray[Any], expected: NDArray[Any]) -> Difference:
        a: NDArray[np.float64] = found.astype(np.float64).ravel()
        b: NDArray[np.float64] = expected.astype(np.float64).ravel()
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return cls(*([float("inf")] * 5))  # a sample that overflows on one side agrees with nothing
        delta = np.abs(a - b)
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        return cls(
            cosine=float(a @ b) / max(norms[0] * norms[1], 1e-300),
            norm_ratio=norms[0] / max(norms[1], 1e-300),
            rms=float(np.sqrt(np.mean(delta**2))),
            p99=float(np.quantile(delta, 0.99)),
            max=float(delta.max()),
        )


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


def make_pairs(oracle: Flow, parameters: int, watch: Callable[[str], None] = lambda stage: None) -> Pairs:
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
        encoded = [patchify(images, config.patch_size)]
        for block in range(config.blocks):
            watch(f"PyTorch encodes block {block}")
            encoded.append(oracle.backend.forward(block, encoded[-1], plain)[0])
        states = encoded[::-1]
        noise = (states[0] / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    watch("PyTorch denoises")
    denoised = oracle.denoise(images, labels) if config.noise_std else None
    return Pairs(noise, labels, images, denoised, tuple(states), decode)


def verify(
    flow: Flow,
    oracle: Flow,
    pairs: Pairs,
    watch: Callable[[str], None] = lambda stage: None,
    resident: Backend | None = None,
) -> dict[str, Any]:
    """The parity card of ``flow`` against ``oracle``: a JSON document, see FORMAT.md.

    ``resident`` is a backend that decodes with the bundle's resident graphs, to be compared too.
    """
    config = flow.config
    plain = Branches.plain(pairs.labels, config.tokens)
    blocks = []
    for place, block in enumerate(reversed(range(config.blocks))):
        watch(f"verify block {block}")
        found = _decode(flow.backend, block, pairs.states[place], pairs.states[place + 1], plain, pairs.serial)
        blocks.append({"block": block, **asdict(Difference.between(found, pairs.states[place + 1]))})
    watch("verify guidance")
    guided = _GUIDANCE.branches(flow.config.tokens, pairs.labels)
    judge = oracle if pairs.serial else flow  # in PyTorch the guided inverse is a walk, too slow for a large model
    guided_worst = max(
        (
            Difference.between(_sweep(flow.backend, block, judge.backend.forward(block, x, guided)[0], x, guided), x)
            for block, x in zip(reversed(range(config.blocks)), pairs.states[1:], strict=True)
        ),
        key=lambda difference: difference.rms,
    )
    resident_worst = None
    if resident is not None:
        watch("verify resident steps")
        resident_worst = max(
            (
                Difference.between(_sweep(resident, block, pairs.states[place], pairs.states[place + 1], plain), x)
                for place, (block, x) in enumerate(zip(reversed(range(config.blocks)), pairs.states[1:], strict=True))
            ),
            key=lambda difference: difference.rms,
        )
    watch("verify likelihood")
    bits = flow.bits_per_dim(pairs.images, pairs.labels).astype(np.float64)
    shift = np.abs(bits - oracle.bits_per_dim(pairs.images, pairs.labels)).max()
    card: dict[str, Any] = {
        "oracle": oracle.backend.description,
        "backend": flow.backend.description,
        "method": "serial decode" if pairs.serial else "fixed-point sweep of oracle patches",
        "samples": len(pairs.noise),
        "tolerance": TOLERANCES[flow.bundle.manifest.precision],
        "blocks": blocks,
        "guided": asdict(guided_worst),
        "bits_per_dim_shift": float(shift),
    }
    if resident_worst is not None:
        card["resident"] = asdict(resident_worst)
    if pairs.serial:
        watch("verify samples")
        found_images = flow.sample(noise=pairs.noise, labels=pairs.labels, denoise=False, certify=True)
        assert found_images.report is not None
        assert found_images.report.certificate is not None
        card["sample"] = asdict(Difference.between(found_images, pairs.images))
        card["certificate"] = float(found_images.report.certificate.max())
    else:  # no sample was drawn: the certificate is that the oracle's images encode to the oracle's latents
        latent, _ = flow.encode(pairs.images, pairs.labels)
        card["certificate"] = float(np.abs(latent - pairs.states[0]).max())
    if pairs.denoised is not None:
        watch("verify denoising")
        card["denoised"] = asdict(Difference.between(flow.denoise(pairs.images, pairs.labels), pairs.denoised))
    return card


def verify_golden(flow: Flow) -> dict[str, Any]:
    """The part of the card that needs no PyTorch: the bundle's golden pairs, and the certificate of their samples."""
    tensors = flow.bundle.tensors(GOLDEN)
    noise, labels, images = tensors["noise"], tensors["labels"], tensors["images"]
    found = flow.sample(noise=noise, labels=labels, denoise=False, certify=True)
    assert found.report is not None
    assert found.report.certificate is not None
    card: dict[str, Any] = {
        "oracle": "golden pairs made by PyTorch",
        "backend": flow.backend.description,
        "method": "serial decode",
        "samples": len(noise),
        "tolerance": TOLERANCES[flow.bundle.manifest.precision],
        "sample": asdict(Difference.between(found, images)),
        "certificate": float(found.report.certificate.max()),
    }
    if "denoised" in tensors:
        card["denoised"] = asdict(Difference.between(flow.denoise(images, labels), tensors["denoised"]))
    return card


def verify_engines(
    bundle: Bundle, folder: Path, record: Record, watch: Callable[[str], None] = lambda stage: None
) -> tuple[Record, str | None]:
    """Run freshly built engines against ONNX Runtime's CPU, and write what came out beside each engine's hash.

    Returns the record, and why nothing could be run, or None. Raises CheckFailed if an engine is out of its
    precision's tolerance; such engines are removed.
    """
    try:
        backend = open_tensorrt(bundle, folder=folder)
    except (MachineError, BundleError) as error:
        return record, briefly(error)
    with _runnable(bundle) as here:
        judge = OrtBackend(here, budget=Budget(low_memory=True))
        parity = engine_parity(bundle, backend, judge, watch)
    against = "ONNX Runtime CPU" + (", bfloat16 emulated" if bundle.manifest.precision == "bf16" else "")
    return keep_parity(folder, record, parity, against), None


def _runnable(bundle: Bundle) -> contextlib.AbstractContextManager[Bundle]:
    """A bundle as ONNX Runtime's CPU runs it; bfloat16 is emulated, which takes onnx, and nothing else does."""
    if bundle.manifest.precision != "bf16":
        return contextlib.nullcontext(bundle)
    from ..export.emulate import runnable

    return runnable(bundle)


def engine_parity(
    bundle: Bundle, backend: Backend, judge: Backend, watch: Callable[[str], None] = lambda stage: None
) -> dict[tuple[int, str], Difference]:
    """(block, kind) -> how far the backend's graph is from the judge's, on the golden pairs and the judge's states."""
    tensors = bundle.tensors(GOLDEN)
    config = bundle.manifest.config
    labels = tensors["labels"]
    plain = Branches.plain(labels, config.tokens)
    states, found = [patchify(tensors["images"], config.patch_size)], {}
    for block in range(config.blocks):
        watch(f"run block {block}'s engines")
        z = judge.forward(block, states[-1], plain)[0]
        found[block, "forward"] = Difference.between(backend.forward(block, states[-1], plain)[0], z)
        decoding = backend.decoding(block, z, plain)
        found[block, "step"] = Difference.between(serial(decoding, config.tokens), states[-1])
        decoding.close()
        states.append(z)
    grad, ones = -states.pop(), np.ones(len(labels), np.float32)
    for block in reversed(range(config.blocks)):
        x = states.pop()
        expected = judge.gradient(block, x, labels, grad, ones)
        found[block, "gradient"] = Difference.between(backend.gradient(block, x, labels, grad, ones), expected)
        grad = expected
    return found


def keep_parity(
    folder: Path, record: Record, parity: dict[tuple[int, str], Difference], against: str = "ONNX Runtime CPU"
) -> Record:
    """Write each engine's parity into the record. Engines out of tolerance are removed, and raise CheckFailed."""
    limit = TOLERANCES[record.precision]["rms"]
    engines = {
        name: replace(engine, parity={"against": against, **asdict(parity[engine.block, engine.kind])})
        for name, engine in record.engines.items()
    }
    wrong = [
        f"{name}: rms error {parity[engine.block, engine.kind].rms:.2g} is above {limit:.2g}"
        for name, engine in engines.items()
        if not parity[engine.block, engine.kind].rms <= limit
    ]
    good = {name: engine for name, engine in engines.items() if not any(w.startswith(name) for w in wrong)}
    record = replace(record, engines=good)
    record.write(folder)
    for name in engines.keys() - good.keys():
        (folder / name).unlink(missing_ok=True)
    if wrong:
        raise CheckFailed(
            "engines that do not compute what their graphs say were not kept:\n  "
            + "\n  ".join(wrong)
            + "\nBuild them again with another --level, or see whether the graphs are right: tarflow verify"
        )
    return record


def failures(card: dict[str, Any]) -> list[str]:
    """Sentences about what in a card is out of its tolerance; empty if all is well."""
    limit = card["tolerance"]
    rms: list[tuple[str, float]] = [
        (part, card[part]["rms"]) for part in ("guided", "resident", "sample", "denoised", "golden") if part in card
    ]
    rms += [(f"block {block['block']}", block["rms"]) for block in card.get("blocks", ())]
    measured = [(f"{part} rms error", value, limit["rms"]) for part, value in rms]
    measured.append(("round-trip error", card["certificate"], limit["certificate"]))
    if "bits_per_dim_shift" in card:
        measured.append(("shift of bits/dim", card["bits_per_dim_shift"], limit["bits_per_dim"]))
    return [f"{what} {value:.2g} is above {most:.2g}" for what, value, most in measured if not value <= most]


def _decode(backend: Backend, block: int, z: Array, x: Array, branches: Branches, whole: bool) -> Array:
    """Invert a block position by position; or, much faster, check in one sweep that x is the graph's fixed point."""
    if not whole:
        return _sweep(backend, block, z, x, branches)
    return serial(backend.decoding(block, z, branches), x.shape[1])


def _sweep(backend: Backend, block: int, z: Array, x: Array, branches: Branches) -> Array:
    """What the steps make of z when every window reads the true patches x: x again, if the graph is right."""
    decoding = backend.decoding(block, z, branches)
    decoding.guess(x)
    for start, stop in _windows(x.shape[1]):
        decoding.step(start, stop - start)
    return decoding.patches()


def _windows(tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(min(_SERIAL_STEPS, tokens - 1)):
        yield start, start + 1
    for start in range(_SERIAL_STEPS, tokens - 1, _SWEEP_WINDOW):
        yield start, min(start + _SWEEP_WINDOW, tokens - 1)
