"""From a bundle's graphs to TensorRT engines, on the machine that will run them. Imports no torch.

One engine per block and graph: step (the resident graph), forward, gradient. TensorRT and TensorRT-RTX share this code;
the latter builds for compute capabilities instead of the GPU at hand, so it needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...runtime.bundle import WEIGHTS, Bundle, ModelShape
from ...runtime.errors import BundleError, CheckFailed, InputError, MachineError
from ...runtime.files import disk_errors, replacing, sha256, size_text
from ...runtime.memory import Budget, cache_row
from ...runtime.tensorrt.backend import import_tensorrt, make_logger, refit
from ...runtime.tensorrt.cuda import Cuda
from ...runtime.tensorrt.record import (
    ENGINE_KINDS,
    FOLDER,
    PACKAGES,
    Engine,
    Profile,
    Range,
    Record,
    Target,
    read_record,
    tensor_shapes,
)
from . import layers as attest

_LEAST_CAPABILITY = 8.0  # Turing multiplies no float32 matrices in TensorRT-RTX: it is built for only when asked for
_LARGEST_GPU = 288 << 30  # bytes of the memory of any GPU there is
_LARGEST_TENSOR = 2**31 - 1  # numbers in a tensor of TensorRT's
IN_PLACE_SINCE = (10, 15)  # TensorRT's first version with an update of the cache in place


@dataclass(frozen=True, slots=True)
class Options:
    """What to build. ``device`` None is the GPU here; else compute capabilities such as ("8.6", "8.9").

    ``batch`` and ``window`` are (least, best, most). ``level`` is TensorRT's optimisation level, 0 to 5.
    """

    batch: Range = (1, 8, 32)
    window: Range = (1, 1, 1)
    device: tuple[str, ...] | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    strip_weights: bool = False
    level: int | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("batch", self.batch), ("window", self.window)):
            least, best, most = numbers
            if not 1 <= least <= best <= most:
                raise InputError(f"{name} is {least},{best},{most}; expected 1 <= MIN <= OPT <= MAX, as in 1,8,32")
        if self.version_compatible and self.strip_weights:
            raise InputError(
                "version-compatible engines run in TensorRT's lean runtime, which cannot fill in weights: leave "
                "--version-compatible or --strip-weights away"
            )
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"level is {self.level}; expected 0 (fastest build) to 5 (fastest engine)")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is: engine ``done`` of ``total`` is at ``fraction``; seconds so far, and left (None: unknown)."""

    name: str
    done: int
    total: int
    fraction: float
    elapsed: float
    left: float | None
    kept: bool = False  # it was there already


Watch = Callable[[Progress], None]
Result = TypeVar("Result")


def build(
    bundle: Bundle,
    engine: str | None = None,
    options: Options | None = None,
    watch: Watch = lambda progress: None,
    package: str | None = None,
) -> tuple[Path, Record]:
    """Build every engine of a bundle into ``BUNDLE/engines/<gpu>-<tensorrt>-<precision>/``; returns folder and record.

    Engines that are there already, from the same graph, weights, profile, TensorRT, GPU and flags, are kept; so an
    interrupted build goes on where it was. ``engine`` is the precision asked for; None is the bundle's. Raises
    CheckFailed if an engine's precision is not what was asked, and keeps no such engine; MachineError without
    TensorRT or, where one is needed, a GPU; BundleError for graphs that do not build.
    """
    options = options or Options()
    bundle.check_runnable()
    _check_request(bundle, engine)
    trt, package = find_tensorrt(package)
    record = new_record(bundle, trt, package, options)
    folder = bundle.folder / FOLDER / folder_name(record)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return folder, _build_all(bundle, record, options, folder, trt, watch)
    finally:
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # something was built
                empty.rmdir()


def _build_all(bundle: Bundle, record: Record, options: Options, folder: Path, trt: Any, watch: Watch) -> Record:
    """Build or keep engine after engine; the record is written after each, so that nothing is built twice."""
    entries = bundle.manifest.blocks
    wanted = {}
    for block, entry in enumerate(entries):
        for kind in ENGINE_KINDS:
            graph = entry.graphs[_graph_kind(trt, record.package, kind)]
            key = _key(bundle, record, graph, options)
            wanted[f"block_{block:02d}.{kind}.engine"] = Engine(
                block, kind, graph, key, "", 0, 0.0, record.precision, "", ""
            )
    old = {name: found for name, found in _finished(folder).items() if name in wanted and found.key == wanted[name].key}
    record = replace(record, engines=old)  # an interruption must not forget what is yet to be looked at
    clock = _Clock(len(wanted), watch)
    for number, (name, engine) in enumerate(wanted.items()):
        if name in old and _is_whole(folder / name, old[name]):
            clock.kept(name, number)
            continue
        clock.begin(name, number)
        build_one = partial(_build_one, bundle, record, options, folder / name, engine, trt, clock.moved)
        made = apart(build_one, clock.tick)
        clock.built()
        record = replace(record, engines={**record.engines, name: made})
        record.write(folder)
    record.write(folder)
    _remove_strangers(folder, record)
    return record


def new_record(bundle: Bundle, trt: Any, package: str, options: Options) -> Record:
    """The record of a build that has not begun. Raises what the target's GPU lacks, InputError for sizes no GPU has."""
    _check_sizes(bundle, options)
    return Record(
        bundle=bundle.hash,
        precision=bundle.manifest.precision,
        package=package,
        version=trt.__version__,
        version_compatible=options.version_compatible,
        strip_weights=options.strip_weights,
        target=_target(trt, package, options),
        profiles=profiles(bundle, options),
        level=options.level,
    )


def folder_name(record: Record) -> str:
    """``<gpu>-<tensorrt>-<precision>``, in characters every file system has."""
    capabilities = "+".join(f"sm{capability.replace('.', '')}" for capability in record.target.capabilities)
    gpu = capabilities if record.target.gpu is None else f"{record.target.gpu}_{capabilities}"
    gpu = re.sub(r"[^a-z0-9+_]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")
    return f"{gpu}-{record.package}_{record.version}-{record.precision}"


def profiles(bundle: Bundle, options: Options) -> dict[str, tuple[Profile, ...]]:
    """What each kind of engine is built for: plain and guided, single steps and windows, batches that fit."""
    config = bundle.manifest.config
    single = [Profile(branches, options.batch) for branches in (1, 2)]
    if options.window[2] > 1:
        single += [Profile(branches, options.batch, options.window) for branches in (1, 2)]
    forward = [Profile(n, _at_most(options.batch, Budget().rows(config, 3 * n, 12 * n))) for n in (1, 2)]
    rows = Budget().rows(config, config.layers + 4, 12 * (config.layers + 1))
    return {
        "step": tuple(single),
        "forward": tuple(forward),
        "gradient": (Profile(1, _at_most(options.batch, rows)),),
    }


def _at_most(batch: Range, rows: int) -> Range:
    least, best, most = (min(size, rows) for size in batch)
    return least, best, most


def _check_request(bundle: Bundle, engine: str | None) -> None:
    precision = bundle.manifest.precision
    if engine is not None and engine not in attest.NAMES.values():
        raise InputError(f"engine '{engine}' is unknown; expected one of {', '.join(attest.NAMES.values())}")
    if engine is not None and engine != precision:
        raise CheckFailed(
            f"asked for {engine} engines, but the graphs in '{bundle.folder}' are typed {precision}, and TensorRT "
            f"builds what is typed; nothing was built. Export them: tarflow export CHECKPOINT --engine {engine}"
        )
    if precision == "int8":
        raise InputError(
            f"'{bundle.folder}' is int8, whose engines cannot be attested yet: TensorRT takes its graphs (see tarflow "
            "check-engine), but does not say which products read int8. Build from fp16: tarflow export CHECKPOINT "
            "-o NEW --engine fp16"
        )
    if not bundle.manifest.blocks[0].has("resident"):
        raise BundleError(
            f"'{bundle.folder}' was exported before there were graphs for devices; export it again, its weights are "
            f"a checkpoint: tarflow export '{bundle.folder}' -o NEW --engine {precision}"
        )


def _check_sizes(bundle: Bundle, options: Options) -> None:
    """Refuse now what TensorRT would after minutes, and windows that no step has."""
    shape, precision = bundle.manifest.config, bundle.manifest.precision
    most, widest = options.batch[2], options.window[2]
    if widest > max(1, shape.tokens - 1):
        raise InputError(
            f"window is {_comma(options.window)}; this model has {shape.tokens} patches, and a window ends before the "
            f"last one: expected {shape.tokens - 1} at most, as in --window 1,{max(1, shape.tokens // 4)},"
            f"{shape.tokens - 1}"
        )
    cache = 2 * cache_row(shape, precision)  # bytes of a guided image
    numbers = 2 * max(shape.width * shape.tokens, widest * max(4 * shape.width, shape.heads * shape.tokens))
    limit = max(1, min(_LARGEST_GPU // cache, _LARGEST_TENSOR // numbers))
    if most > limit:
        raise InputError(
            f"batch is {_comma(options.batch)}; for {most} guided images the cache takes {size_text(most * cache)} and "
            f"the largest tensor has {most * numbers} numbers, where TensorRT counts to {_LARGEST_TENSOR}: expected "
            f"{limit} at most for this model, as in --batch 1,{min(8, limit)},{min(32, limit)}"
        )


def _comma(numbers: Range) -> str:
    return ",".join(map(str, numbers))


def find_tensorrt(package: str | None) -> tuple[Any, str]:
    """The builder that is here: TensorRT before TensorRT-RTX."""
    reasons = []
    for name in (package,) if package else PACKAGES:
        try:
            trt = import_tensorrt(name)
        except MachineError as error:
            reasons.append(str(error).split("; pip")[0])
            continue
        if hasattr(trt, "Builder"):
            return trt, name
        reasons.append(f"{name} has no builder")
    raise MachineError(
        f"engines need TensorRT: {'; '.join(reasons)}. Install it with pip install tensorrt-cu13 (on the GPU's own "
        "machine), or pip install 'tarflow[tensorrt-rtx]', which also builds where there is no GPU"
    )


def _target(trt: Any, package: str, options: Options) -> Target:
    """Which GPUs the engines will be for."""
    if package == "tensorrt_rtx":
        if options.version_compatible:
            raise InputError(
                "TensorRT-RTX has no version-compatible engines; leave --version-compatible away, and build again "
                "after an update"
            )
        names = (name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        known = sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=float)
        if options.device is None:
            with contextlib.suppress(MachineError):
                cuda = Cuda()
                if cuda.capability in known:
                    return Target(None, (cuda.capability,))
        asked = options.device or tuple(name for name in known if float(name) >= _LEAST_CAPABILITY)
        unknown = [capability for capability in asked if capability not in known]
        if unknown:
            raise InputError(
                f"TensorRT-RTX {trt.__version__} builds no engines for compute capability {', '.join(unknown)}; it "
                f"knows {', '.join(known)}. Data-centre GPUs take tensorrt instead"
            )
        return Target(None, asked)
    cuda = Cuda()  # TensorRT tunes on the GPU it builds for
    if options.device is None:
        return Target(cuda.name, (cuda.capability,))
    if options.device != (cuda.capability,):
        raise InputError(
            f"TensorRT builds on the GPU at hand, which is {cuda.name} ({cuda.capability}), not for "
            f"{', '.join(options.device)}: run tarflow build on that machine, or leave --device away"
        )
    return Target(None, (cuda.capability,))


def _sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _graph_kind(trt: Any, package: str, kind: str) -> str:
    """The graph an engine is built from: the step's depends on what the parser knows."""
    if kind != "step":
        return kind
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    return "resident" if package == "tensorrt_rtx" or version >= IN_PLACE_SINCE else "pingpong"


def _key(bundle: Bundle, record: Record, graph: str, options: Options) -> str:
    """SHA-256 over everything an engine depends on; the timing cache only changes how long it takes."""
    files = bundle.manifest.files
    kind = graph.split(".")[1]
    parts = {
        "graph": files[graph].sha256,
        "weights": files[WEIGHTS].sha256,
        "profiles": [asdict(p) for p in record.profiles["step" if kind in ("resident", "pingpong") else kind]],
        "tensorrt": [record.package, record.version],
        "target": asdict(record.target),
        "flags": [options.version_compatible, options.strip_weights, options.level],
        "precision": record.precision,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path) -> dict[str, Engine]:
    """Engines of an earlier build; none if its record cannot be read."""
    try:
        return dict(read_record(folder).engines)
    except BundleError:
        return {}


def _is_whole(path: Path, engine: Engine) -> bool:
    return path.is_file() and not path.is_symlink() and sha256(path) == engine.sha256


def _remove_strangers(folder: Path, record: Record) -> None:
    """Engines of earlier versions of the bundle: nothing refers to them any more."""
    for path in folder.glob("*.engine"):
        if path.name not in record.engines:
            path.unlink()


def _build_one(
    bundle: Bundle,
    record: Record,
    options: Options,
    path: Path,
    engine: Engine,
    trt: Any,
    moved: Callable[[float], None],
    cancelled: threading.Event,
) -> Engine:
    """Build, attest, and only then write one engine."""
    started = time.monotonic()
    parsed = Parsed(trt, bundle.path(engine.graph))
    finding = attest.read_network(trt, parsed.network)
    _require(finding, engine, path)
    sizes = profile_sizes(bundle.manifest.config, record, engine.kind)
    config = builder_config(parsed, record, options, sizes)
    config.progress_monitor = progress_monitor(trt, moved, cancelled)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise BundleError(
            f"block {engine.block}'s {engine.kind} graph does not build with {record.package} {record.version} for "
            f"{record.target}: {parsed.log.take()}"
        )
    content = memoryview(plan)
    if options.timing_cache is not None:
        _keep_timing(config, options.timing_cache)
    if _can_run(record):
        loaded = _deserialised(trt, parsed.log, content, path)
        if options.strip_weights:  # as it will run: with the weights filled in
            refit(trt, parsed.log, loaded, bundle.path(engine.graph))
        finding = attest.read_engine(trt, loaded)
        _require(finding, engine, path)
    with replacing(path) as file:
        file.write(content)
    return replace(
        engine,
        sha256=hashlib.sha256(content).hexdigest(),
        size=content.nbytes,
        seconds=round(time.monotonic() - started, 2),
        built=finding.built,
        attested=finding.source,
    )


class Parsed:
    """A graph in TensorRT's hands. The parser owns weights that the network points to: keep it until the build ends.

    Raises BundleError naming the node that the parser does not take.
    """

    def __init__(self, trt: Any, path: Path) -> None:
        self.trt, self.log = trt, make_logger(trt)
        self.builder = trt.Builder(self.log)
        flags = 0
        if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # TensorRT 11 knows no other way
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flags)
        self.parser = trt.OnnxParser(self.network, self.log)
        if not self.parser.parse_from_file(str(path)):
            errors = [self.parser.get_error(number) for number in range(self.parser.num_errors)]
            said = "; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors[:3])
            raise BundleError(
                f"'{path}' is not taken by TensorRT's parser {trt.__version__}: {said or self.log.take()}"
            )


Sizes = list[dict[str, tuple[int, ...]]]  # least, best and most of every input's shape: one profile


def profile_sizes(config: ModelShape, record: Record, kind: str) -> list[Sizes]:
    """The profiles of a kind of engine, as shapes of its inputs."""
    return [
        [
            tensor_shapes(config, kind, batch, profile.branches, window)
            for batch, window in zip(profile.batch, profile.window, strict=True)
        ]
        for profile in record.profiles[kind]
    ]


def builder_config(parsed: Parsed, record: Record, options: Options, profiles: list[Sizes]) -> Any:
    """The builder's configuration, by way of Polygraphy, which knows what changed between versions."""
    trt = parsed.trt
    CreateConfig, Shapes, quietly = _polygraphy(trt, record.package)
    shapes = []
    for sizes in profiles:
        shapes.append(Shapes())
        for name in sizes[0]:
            shapes[-1].add(name, *(size[name] for size in sizes))
    cache = options.timing_cache
    with quietly():
        config = CreateConfig(
            profiles=shapes,
            tf32=False,  # fp32 means fp32
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # or the inspector tells nothing
            builder_optimization_level=options.level,
            load_timing_cache=str(cache) if cache is not None and cache.exists() else None,
            version_compatible=options.version_compatible or None,
            exclude_lean_runtime=options.version_compatible or None,  # it would be code in the engine
            strip_plan=options.strip_weights or None,
        )(parsed.builder, parsed.network)
    config.max_aux_streams = 0  # one stream, so that a step can be captured
    if record.package == "tensorrt_rtx":
        config.num_compute_capabilities = len(record.target.capabilities)
        for number, capability in enumerate(record.target.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _sm(capability)), number)
    elif record.target.gpu is None:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    return config


def _polygraphy(trt: Any, package: str) -> tuple[Any, Any, Callable[[], contextlib.AbstractContextManager[None]]]:
    """Polygraphy's configuration and profile, and the context in which to use them: quiet, and on this TensorRT.

    Polygraphy takes its TensorRT from an environment variable, once a process; so what it took is replaced for a while.
    """
    try:
        from polygraphy import config as settings
        from polygraphy.backend.trt import CreateConfig, Profile
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MachineError(f"Polygraphy is not installed ({error}); pip install 'tarflow[tensorrt]'") from None

    # Not by attribute: the package's names hide its modules'.
    configuring, checking = (sys.modules[f"polygraphy.backend.trt.{name}"] for name in ("config", "util"))

    @contextlib.contextmanager
    def using() -> Iterator[None]:
        before = settings.USE_TENSORRT_RTX, configuring.trt, checking.trt
        settings.USE_TENSORRT_RTX = package == "tensorrt_rtx"
        configuring.trt = checking.trt = trt  # type: ignore[attr-defined]
        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                yield
        finally:
            settings.USE_TENSORRT_RTX, configuring.trt, checking.trt = before  # type: ignore[attr-defined]

    return CreateConfig, Profile, using


def _keep_timing(config: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX has nothing to put in it
        cache = config.get_timing_cache()
    if cache is not None:
        with replacing(path) as file:
            file.write(memoryview(cache.serialize()))


def _require(finding: attest.Finding, engine: Engine, path: Path) -> None:
    wrong = finding.mismatch(engine.asked)
    if wrong:
        raise CheckFailed(
            f"block {engine.block}'s {engine.kind} engine is not what was asked for: {wrong}. It was not kept as "
            f"'{path}'; the graph '{engine.graph}' is typed wrongly: export the bundle again"
        )


def _can_run(record: Record) -> bool:
    """Whether engines built now can be loaded here."""
    try:
        cuda = Cuda()
    except MachineError:
        return False
    return cuda.capability in record.target.capabilities and record.target.gpu in (None, cuda.name)


def _deserialised(trt: Any, log: Any, content: Any, path: Path) -> Any:
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BundleError(f"'{path}' was built but does not load: {log.take()}")
    return engine


class _Clock:
    """Keeps time over all engines of a build, and tells how far it is."""

    def __init__(self, total: int, watch: Watch) -> None:
        self.total, self.watch = total, watch
        self._started = self._told = time.monotonic()
        self._built = 0
        self._name, self._number, self._fraction = "", 0, 0.0

    def kept(self, name: str, number: int) -> None:
        self.watch(Progress(name, number + 1, self.total, 1.0, self._elapsed(), None, kept=True))

    def begin(self, name: str, number: int) -> None:
        self._name, self._number, self._fraction = name, number, 0.0
        self._tell()

    def tick(self) -> None:
        if time.monotonic() - self._told > 1:
            self._tell()

    def built(self) -> None:
        self._built += 1
        self._fraction = 1.0
        self._tell()

    def moved(self, fraction: float) -> None:
        self._fraction = max(self._fraction, fraction)

    def _tell(self) -> None:
        self._told = time.monotonic()
        done = self._built + self._fraction
        left = None
        if self._built:  # engines of a kind take alike; before the first nobody knows
            left = self._elapsed() / max(done, 0.1) * (self.total - self._number - self._fraction)
        self.watch(Progress(self._name, self._number + 1, self.total, self._fraction, self._elapsed(), left))

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def apart(work: Callable[[threading.Event], Result], tick: Callable[[], None] = lambda: None) -> Result:
    """``work(cancelled)``, run in a thread of its own; on Ctrl-C ``cancelled`` is set, and its end awaited.

    TensorRT swallows the KeyboardInterrupt that Python raises in one of its callbacks (log lines, progress), and a
    process that ends while TensorRT still builds is aborted. So no callback may run in the main thread, and nothing
    but the work's own end ends the wait: after an interruption Thread.join counts a running thread as ended.
    """
    cancelled, ended = threading.Event(), threading.Event()
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(cancelled))
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="tarflow-build").start()
        while not ended.wait(0.1):
            tick()
    except BaseException:
        cancelled.set()
        while not ended.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
        raise
    if failures:
        raise failures[0]
    return results[0]


def progress_monitor(trt: Any, moved: Callable[[float], None], cancelled: threading.Event) -> Any:
    """TensorRT's progress monitor: nested phases of known length become one fraction of the outermost."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a base that is known only now
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, steps, step + 1)
            moved(self._fraction())
            return not cancelled.is_set()

        def _fraction(self) -> float:
            total, weight = 0.0, 1.0
            for _, steps, done in self._phases.values():  # in the order they began: outermost first
                total += weight * min(done, steps) / steps
                weight /= steps
            return min(total, 1.0)

    return Monitor()
