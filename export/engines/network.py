"""A graph in TensorRT's hands: parsed to a network, configured, built to a plan, loaded to be looked at."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...runtime.errors import BundleError, MachineError
from ...runtime.files import replacing
from ...runtime.tensorrt.library import make_logger
from .blueprint import Blueprint
from .target import capability_name


class Parsed:
    """A graph as TensorRT's network. The parser owns weights that the network points to: keep it until the build ends.

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
            why = "; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors[:3])
            raise BundleError(f"'{path}' is not taken by TensorRT's parser {trt.__version__}: {why or self.log.take()}")

    def built(self, config: Any) -> Any:
        """The engine as bytes; None if it does not build, and ``log`` says why."""
        return self.builder.build_serialized_network(self.network, config)

    def loaded(self, plan: Any) -> Any:
        """A plan as an engine, to be looked at. Raises BundleError if it does not load."""
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = False
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"an engine was built, but does not load: {self.log.take()}")
        return engine


def builder_config(parsed: Parsed, blueprint: Blueprint, graph: str) -> Any:
    """The builder's configuration for a kind of graph; Polygraphy makes it, and knows what changed between versions."""
    trt, record, options = parsed.trt, blueprint.record, blueprint.options
    CreateConfig, Shapes, quietly = polygraphy(trt, record.package)
    profiles = []
    for sizes in blueprint.shapes(graph):
        profiles.append(Shapes())
        for name in sizes[0]:
            profiles[-1].add(name, *(size[name] for size in sizes))
    cache = options.timing_cache
    with quietly():
        config = CreateConfig(
            profiles=profiles,
            tf32=False,  # fp32 means fp32
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # or the inspector tells nothing
            builder_optimization_level=options.level,
            load_timing_cache=str(cache) if cache is not None and cache.exists() else None,
        )(parsed.builder, parsed.network)
    config.max_aux_streams = 0  # one stream, so that a step can be captured
    if record.package == "tensorrt_rtx":
        config.num_compute_capabilities = len(record.target.capabilities)
        for number, capability in enumerate(record.target.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability_name(capability)), number)
    elif record.target.gpu is None:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    return config


def polygraphy(trt: Any, package: str) -> tuple[Any, Any, Callable[[], contextlib.AbstractContextManager[None]]]:
    """Polygraphy's configuration and profile, and the context in which to use them: quiet, and on this TensorRT.

    Polygraphy takes its TensorRT from an environment variable, once a process; so what it took is replaced for a while.
    """
    try:
        from polygraphy import config as settings
        from polygraphy.backend.trt import CreateConfig, Profile
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        extra = package.replace("_", "-")
        raise MachineError(f"Polygraphy is not installed ({error}); pip install 'tarflow[{extra}]'") from None

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


def keep_timing(config: Any, path: Path) -> None:
    """Write what a build measured, for the next one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX has nothing to put in it
        cache = config.get_timing_cache()
    if cache is not None:
        with replacing(path) as file:
            file.write(memoryview(cache.serialize()))
