"""From a bundle's graphs to TensorRT engines, on the machine that will run them. Imports no torch.

One engine per block and graph: step (the resident graph), forward, gradient. TensorRT and TensorRT-RTX share this code;
the latter builds for compute capabilities instead of the GPU at hand, so it needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...runtime.bundle import RESIDENT, Bundle
from ...runtime.errors import BundleError, CheckFailed, InputError, Remedy
from ...runtime.files import disk_errors, replacing, sha256
from ...runtime.precision import ENGINE_PRECISIONS, PRECISIONS
from ...runtime.tensorrt.record import Engine, Record
from ...runtime.tensorrt.record_reader import read_record
from .blueprint import GRAPHS, Blueprint
from .layers import Attestation, read_engine, read_network
from .network import Parsed, builder_config, keep_timing
from .options import Options
from .progress import Clock, Watch, apart, monitor
from .target import runs_here


def build(
    bundle: Bundle, engine: str | None = None, options: Options | None = None, watch: Watch = lambda headway: None
) -> tuple[Path, Record]:
    """Build every engine of a bundle into ``BUNDLE/engines/<gpu>-<tensorrt>-<precision>/``; returns folder and record.

    Engines that are there already, from the same graph, weights, profile, TensorRT, GPU and level, are kept; so an
    interrupted build goes on where it was. ``engine`` is the precision asked for; None is the bundle's. Raises
    CheckFailed if an engine's precision is not what was asked, and keeps no such engine; MachineError without
    TensorRT or, where one is needed, a GPU; InputError for options that cannot be; BundleError for graphs that do not
    build.
    """
    bundle.check_runnable()
    _check_precision(bundle, engine)
    blueprint = Blueprint.of(bundle, options or Options())
    folder = blueprint.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return folder, _build_all(blueprint, watch)
    finally:
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # something was built
                empty.rmdir()


def _build_all(blueprint: Blueprint, watch: Watch) -> Record:
    """Build or keep engine after engine; the record is written after each, so that nothing is built twice."""
    folder, wanted = blueprint.folder, blueprint.engines()
    old = {name: found for name, found in _finished(folder).items() if name in wanted and found.key == wanted[name].key}
    record = replace(blueprint.record, engines=old)  # an interruption must not forget what is yet to be looked at
    clock = Clock(len(wanted), watch)
    for name, engine in wanted.items():
        if name in old and _is_whole(folder / name, old[name]):
            clock.begin(name, kept=True)
            continue
        clock.begin(name)
        made = apart(partial(_build_one, blueprint, name, engine, clock.moved), clock.tick)
        clock.built()
        record = replace(record, engines={**record.engines, name: made})
        record.write(folder)
    record.write(folder)
    for path in folder.glob("*.engine"):
        if path.name not in record.engines:  # of an earlier version of the bundle: nothing refers to it any more
            path.unlink()
    return record


def _build_one(
    blueprint: Blueprint, name: str, engine: Engine, moved: Callable[[float], None], cancelled: threading.Event
) -> Engine:
    """Build, attest, and only then write one engine."""
    started = time.monotonic()
    trt, record, timings = blueprint.trt, blueprint.record, blueprint.options.timing_cache
    parsed = Parsed(trt, blueprint.bundle.path(engine.graph))
    attested = _as_asked(read_network(trt, parsed.network), engine)
    config = builder_config(parsed, blueprint, GRAPHS[engine.kind])
    config.progress_monitor = monitor(trt, moved, cancelled)
    plan = parsed.built(config)
    if plan is None:
        raise BundleError(
            f"block {engine.block}'s {engine.kind} graph does not build with {record.package} {record.version} for "
            f"{record.target}: {parsed.log.take()}"
        )
    content = memoryview(plan)
    if timings is not None:
        keep_timing(config, timings)
    if runs_here(record.target):
        attested = _as_asked(read_engine(trt, parsed.loaded(content)), engine)
    with replacing(blueprint.folder / name) as file:
        file.write(content)
    return replace(
        engine,
        sha256=hashlib.sha256(content).hexdigest(),
        size=content.nbytes,
        seconds=round(time.monotonic() - started, 2),
        built=attested.built,
        attested=attested.source,
    )


def _check_precision(bundle: Bundle, engine: str | None) -> None:
    """Raises CheckFailed for another precision than the bundle's, InputError for one without engines, BundleError for a
    bundle without graphs for devices.
    """
    precision, known = bundle.manifest.precision, tuple(ENGINE_PRECISIONS.values())
    if engine is not None and engine not in known:
        raise InputError.of("engine", f"'{engine}'", f"one of {', '.join(known)}")
    if engine is not None and engine != precision:
        raise CheckFailed(
            f"asked for {engine} engines, but the graphs in '{bundle.folder}' are typed {precision}, and TensorRT "
            "builds what is typed; nothing was built. Export the checkpoint in that precision",
            field="engine",
            remedy=Remedy("export", {"engine": engine}),
        )
    if PRECISIONS[precision].tensorrt is None:
        raise InputError(
            f"'{bundle.folder}' is {precision}, whose engines cannot be attested yet: TensorRT takes its graphs, but "
            "does not say which products read int8; export the checkpoint in fp16, and build from that",
            field="engine",
            remedy=Remedy("export", {"engine": "fp16"}),
        )
    if RESIDENT not in bundle.manifest.blocks[0].graphs:
        raise BundleError(
            f"'{bundle.folder}' was exported before there were graphs for devices; export it again, its weights are a "
            "checkpoint",
            remedy=Remedy("export", {"checkpoint": bundle.folder, "engine": precision}),
        )


def _as_asked(attested: Attestation, engine: Engine) -> Attestation:
    """Raises CheckFailed for an engine in another precision than was asked for."""
    wrong = attested.mismatch(engine.asked)
    if wrong:
        raise CheckFailed(
            f"block {engine.block}'s {engine.kind} engine is not what was asked for: {wrong}. It was not kept; the "
            f"graph '{engine.graph}' is typed wrongly: export the bundle again",
            remedy=Remedy("export", {"engine": engine.asked}),
        )
    return attested


def _finished(folder: Path) -> dict[str, Engine]:
    """Engines of an earlier build; none if its record cannot be read."""
    try:
        return dict(read_record(folder).engines)
    except BundleError:
        return {}


def _is_whole(path: Path, engine: Engine) -> bool:
    return path.is_file() and not path.is_symlink() and sha256(path) == engine.sha256
