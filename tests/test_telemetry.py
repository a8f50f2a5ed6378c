"""Nothing is written below HOME and nobody is asked for: ONNX Runtime's telemetry stays off, in Python and in C++."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from .conftest import DEMO, until
from .cpp_library import onnxruntime_library

ROOT = Path(__file__).parent.parent
FEATURES = ROOT / "tarflow" / "features" / "digits.onnx"
# Every name that is looked up is written down, and no address is told.
WATCH = r"""
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  FILE *log = fopen(getenv("LOOKUPS"), "a");
  fprintf(log, "%s\n", node ? node : "");
  fclose(log);
  return EAI_FAIL;
}
"""

WAYS = {
    "python": f"from tarflow.runtime.flow import Flow\nFlow.open({str(DEMO)!r}, threads=1).sample(1)",
    "features": f"from tarflow.quality.features import FeatureNetwork\nFeatureNetwork.open({str(FEATURES)!r})",
    "libtarflow": f"from tests.cpp_library import CppFlow\nflow = CppFlow({str(DEMO)!r}, threads=1)\nflow.sample(1)",
}
Start = Callable[..., Path]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start("python"): a process in a home of its own that opens something, and lives on until ``running`` ends."""
    library = tmp_path / "watch.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=WATCH, text=True, check=True)

    def run(way: str, running: ExitStack, **environment: str) -> Path:
        home = tmp_path / "-".join((way, *environment))
        home.mkdir()
        environment |= {"HOME": str(home), "LD_PRELOAD": str(library), "LOOKUPS": f"{home}.lookups"}
        code = WAYS[way] + "\nimport sys\nprint(end='x', flush=True)\nsys.stdin.read()"
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, stdin=pipe, stdout=pipe)
        running.enter_context(process)
        assert process.stdout is not None
        running.callback(lambda: process.communicate() and None)
        assert process.stdout.read(1) == b"x", "the process failed"
        return home

    return run


def test_nothing_is_written_below_home_and_no_name_is_looked_up(start: Start) -> None:
    with ExitStack() as running:
        quiet = [start(way, running) for way in WAYS]
        if b"ORT_DISABLE_TELEMETRY" in Path(onnxruntime_library()).read_bytes():
            loud = start("python", running, ORT_DISABLE_TELEMETRY="0")  # a user's own wish stays
            until(Path(f"{loud}.lookups").exists)  # the others began before it, and had as long to do the same
            assert list(loud.rglob("*.db"))
    for home in quiet:
        assert not list(home.iterdir())
        assert not Path(f"{home}.lookups").exists()
