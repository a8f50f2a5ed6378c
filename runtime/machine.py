"""What this machine computes on, by name, which is what a measured plan is true for; and how much of it is ours."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

MOST_THREADS = 64  # of the native engine; no share of the cores is larger

_ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"


def processor() -> str:
    """The processor's model."""
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def cores(root: Path = _ROOT) -> int:
    """Cores this process may keep busy: those it may run on, and no more than its quota is worth, but one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return usable if quota is None else max(1, min(usable, int(quota)))


def cores_each(count: int) -> int:
    """The threads of each of ``count`` that share this process's cores: 1 to MOST_THREADS."""
    return min(max(1, cores() // max(count, 1)), MOST_THREADS)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that control groups (Linux, v1 and v2) give this process: 0.5 is half a core's.

    None without a limit. ``root`` is where /proc and /sys lie.
    """
    limits = [limit for group in _groups(root) if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups for processor time, and of the groups around them, as far as they are seen.

    A container sees its own group at the top, whatever path it is said to have.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops = [root / _GROUPS / name for name in {controllers, "cpu"}] if controllers else [root / _GROUPS]
        inner = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / part for part in (inner, *inner.parents))


def _limit(group: Path) -> float | None:
    """Of v2, "QUOTA PERIOD" in one file, "max" for none; of v1, a file each, -1 for none. Both are microseconds."""
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        words = [line for name in ("quota", "period") for line in _lines(group / f"cpu.cfs_{name}_us")]
    quota, period = (int(word) if word.isdigit() else 0 for word in words) if len(words) == 2 else (0, 0)
    return quota / period if quota and period else None


def _field(path: Path, name: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines(path) if line.startswith(name)), "")


def _lines(path: Path) -> list[str]:
    """Of a file that the system makes up; none where it does not."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
