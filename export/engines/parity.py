"""Do engine files compute what their graphs say? Each is run against ONNX Runtime's CPU, on the golden pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...quality.card import Difference
from ...quality.parity import Watch, stored_pairs
from ...runtime.backend import Backend, Branches
from ...runtime.bundle import Bundle
from ...runtime.decode import serial
from ...runtime.errors import BundleError, CheckFailed, MachineError, Remedy, briefly
from ...runtime.image import patchify
from ...runtime.opening import Opening
from ...runtime.ort.backend import OrtBackend
from ...runtime.precision import PRECISIONS
from ...runtime.tensorrt.backend import open_tensorrt
from ...runtime.tensorrt.record import Record


def verify_engines(
    bundle: Bundle, folder: Path, record: Record, watch: Watch = lambda stage: None
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
        judge = OrtBackend(here, Opening("cpu", memory="least"))
        parity = engine_parity(bundle, backend, judge, watch)
    against = "ONNX Runtime CPU" + (", bfloat16 emulated" if here is not bundle else "")
    return keep_parity(folder, record, parity, against), None


def _runnable(bundle: Bundle) -> contextlib.AbstractContextManager[Bundle]:
    """A bundle as ONNX Runtime's CPU runs it; bfloat16 is emulated, which takes onnx, and nothing else here does."""
    if bundle.manifest.precision != "bf16":
        return contextlib.nullcontext(bundle)
    from ..emulate import runnable

    return runnable(bundle)


def engine_parity(
    bundle: Bundle, backend: Backend, judge: Backend, watch: Watch = lambda stage: None
) -> dict[tuple[int, str], Difference]:
    """(block, kind) -> how far the backend's graph is from the judge's, on the golden pairs and the judge's states."""
    pairs, config = stored_pairs(bundle), bundle.manifest.config
    labels = pairs.labels
    plain = Branches.plain(labels, config.tokens)
    states, found = [patchify(pairs.images, config.patch_size)], {}
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
    folder: Path, record: Record, parity: Mapping[tuple[int, str], Difference], against: str = "ONNX Runtime CPU"
) -> Record:
    """Write each engine's parity into the record. Engines out of tolerance are removed, and raise CheckFailed."""
    limit, good, wrong = PRECISIONS[record.precision].tolerance.rms, {}, []
    for name, engine in record.engines.items():
        found = parity[engine.block, engine.kind]
        if found.rms <= limit:
            good[name] = replace(engine, parity={"against": against, **asdict(found)})
        else:
            wrong.append(f"{name}: rms error {found.rms:.2g} is above {limit:.2g}")
    kept = replace(record, engines=good)
    kept.write(folder)
    for name in record.engines.keys() - good.keys():
        (folder / name).unlink(missing_ok=True)
    if wrong:
        raise CheckFailed(
            "engines that do not compute what their graphs say were not kept:\n  "
            + "\n  ".join(wrong)
            + "\nBuild them again with another `level`; to see whether the graphs are right, verify the bundle",
            field="level",
            remedy=Remedy("verify", {"bundle": folder.parent.parent}),
        )
    return kept
