"""Which TensorRT builds, and which GPUs the engines will be for."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from ...runtime.errors import InputError, MachineError, briefly
from ...runtime.tensorrt.cuda import Cuda
from ...runtime.tensorrt.library import import_tensorrt
from ...runtime.tensorrt.record import PACKAGES, Record, Target

_LEAST_CAPABILITY = 8.0  # Turing multiplies no float32 matrices in TensorRT-RTX: it is built for only when asked for


def find_tensorrt() -> tuple[Any, str]:
    """The builder that is here, and its package: TensorRT before TensorRT-RTX. Raises MachineError without one."""
    reasons = []
    for name in PACKAGES:
        try:
            trt = import_tensorrt(name)
        except MachineError as error:
            reasons.append(briefly(error))
            continue
        if hasattr(trt, "Builder"):
            return trt, name
        reasons.append(f"{name} has no builder")
    raise MachineError(
        f"engines need TensorRT: {', '.join(reasons)}; install it with pip install tensorrt-cu13 (on the GPU's own "
        "machine), or pip install 'tarflow[tensorrt-rtx]', which also builds where there is no GPU"
    )


def target_of(trt: Any, package: str, device: tuple[str, ...] | None) -> Target:
    """The GPUs that engines are built for, if ``device`` was asked for. TensorRT builds for the GPU at hand alone,
    TensorRT-RTX for compute capabilities. Raises InputError for others, MachineError where a GPU is needed.
    """
    if package == "tensorrt_rtx":
        return _any_of(trt, device)
    cuda = Cuda()  # TensorRT tunes on the GPU it builds for
    if device is not None and device != (cuda.capability,):
        why = f"TensorRT builds on the GPU at hand, {cuda.name}; build on the machine of the other, or leave it out"
        raise InputError.of("device", ",".join(device), cuda.capability, why)
    return Target(cuda.name if device is None else None, (cuda.capability,))


def _any_of(trt: Any, device: tuple[str, ...] | None) -> Target:
    """Any GPU of the compute capabilities asked for, else of the one here, else of all that there are."""
    names = (name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    known = sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=float)
    if device is None:
        with contextlib.suppress(MachineError):
            cuda = Cuda()
            if cuda.capability in known:
                return Target(None, (cuda.capability,))
    asked = device or tuple(name for name in known if float(name) >= _LEAST_CAPABILITY)
    if not set(asked) <= set(known):
        why = f"TensorRT-RTX {trt.__version__} builds no engines for others; data-centre GPUs take tensorrt instead"
        raise InputError.of("device", ",".join(asked), f"some of {', '.join(known)}", why)
    return Target(None, asked)


def runs_here(target: Target) -> bool:
    """Whether engines built now can be loaded on this machine."""
    try:
        cuda = Cuda()
    except MachineError:
        return False
    return cuda.capability in target.capabilities and target.gpu in (None, cuda.name)


def capability_name(capability: str) -> str:
    """A compute capability as TensorRT-RTX spells it: SM89 for "8.9"."""
    return "SM" + capability.replace(".", "")


def folder_name(record: Record) -> str:
    """``<gpu>-<tensorrt>-<precision>``, in characters every file system has."""
    capabilities = "+".join(capability_name(one).lower() for one in record.target.capabilities)
    gpu = capabilities if record.target.gpu is None else f"{record.target.gpu}_{capabilities}"
    gpu = re.sub(r"[^a-z0-9+_]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")
    return f"{gpu}-{record.package}_{record.version}-{record.precision}"
