"""A graph in TensorRT's hands: parsed to a network, configured, built to a plan, loaded to be looked at."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ...runtime.errors import BundleError
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
            said = "; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors[:3])
            raise BundleError(
                f"'{path}' is not taken by TensorRT's parser {trt.__version__}: {said or self.log.take()}"
            )

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
    """The builder's configuration for a kind of graph."""
    trt, record, options = parsed.trt, blueprint.record, blueprint.options
    config = parsed.builder.create_builder_config()
    for sizes in blueprint.shapes(graph):
        profile = parsed.builder.create_optimization_profile()
        for name in sizes[0]:
            profile.set_shape(name, *(size[name] for size in sizes))
        config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells nothing
    config.max_aux_streams = 0  # one stream, so that a step can be captured
    if options.level is not None:
        config.builder_optimization_level = options.level
    cache = options.timing_cache
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # TensorRT-RTX keeps no timings
        timings = config.create_timing_cache(cache.read_bytes() if cache is not None and cache.exists() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    if record.package == "tensorrt_rtx":
        config.num_compute_capabilities = len(record.target.capabilities)
        for number, capability in enumerate(record.target.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability_name(capability)), number)
    elif record.target.gpu is None:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    return config


def keep_timing(config: Any, path: Path) -> None:
    """Write what a build measured, for the next one."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # TensorRT-RTX keeps no timings
        timings = config.get_timing_cache()
    if timings is not None:
        with replacing(path) as file:
            file.write(memoryview(timings.serialize()))
