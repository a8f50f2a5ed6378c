"""Where this checkout lies, and what of it is used here."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "tarflow" / "demo"
KEPT = ROOT / "build" / "gpu"  # git ignores it
LIBTARFLOW = ROOT / "runtime" / "cpp" / "build" / "release" / "libtarflow.so"
