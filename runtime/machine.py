"""What this machine computes on, by name: what a measured plan is true for."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's model."""
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def gpu() -> str:
    """The first NVIDIA GPU's model, by its driver's word; empty if there is none."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        return _field(information, "Model")
    return ""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _field(path: Path, name: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
