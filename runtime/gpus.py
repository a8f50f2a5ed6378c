"""The GPUs that CUDA has here: their names and UUIDs, by its driver's word, in the order in which programs number them.

CUDA_VISIBLE_DEVICES and MIG decide what is seen, and as what.
"""

from __future__ import annotations

import ctypes
import uuid
from dataclasses import dataclass

from .errors import InputError

_DRIVER = "libcuda.so.1"
_NAME = 256  # bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """``uuid`` as nvidia-smi spells it, but for what stands before its first number: GPU- or MIG-."""

    name: str
    uuid: str


def gpus() -> tuple[Gpu, ...]:
    """None where there is no driver, or nothing that it may show."""
    try:
        driver = ctypes.CDLL(_DRIVER)
        describe = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid  # the former knows of MIG
    except (OSError, AttributeError):
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for number in range(count.value):
        device, name, identity = ctypes.c_int(), ctypes.create_string_buffer(_NAME), ctypes.create_string_buffer(16)
        failed = driver.cuDeviceGet(ctypes.byref(device), number)
        failed = failed or driver.cuDeviceGetName(name, _NAME, device) or describe(identity, device)
        found.append(Gpu("" if failed else name.value.decode(), "" if failed else str(uuid.UUID(bytes=identity.raw))))
    return tuple(found)


def numbered(device: str) -> int:
    """The number of a ``device`` that is named by number or UUID, of which a beginning that fits one will do; the first
    one's if it is "". Raises InputError for one that CUDA does not have here.
    """
    if not device:
        return 0
    here = gpus()
    if device.isdecimal():
        fitting = [int(device)] if int(device) < len(here) else []
    else:
        asked = device.lower().removeprefix("gpu-").removeprefix("mig-")
        fitting = [number for number, gpu in enumerate(here) if gpu.uuid.startswith(asked)]
    if len(fitting) != 1:
        known = "; ".join(f"{number}: {gpu.name}, {gpu.uuid}" for number, gpu in enumerate(here))
        raise InputError.of("provider", f"device '{device}'", f"one of those that CUDA has here ({known or 'none'})")
    return fitting[0]


def named(number: int) -> str:
    """The name of a device; empty where the driver tells none."""
    here = gpus()
    return here[number].name if number < len(here) else ""
