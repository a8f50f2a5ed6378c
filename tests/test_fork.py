"""A flow that was used, and then inherited by a forked process: it goes on there, and can be dropped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from .conftest import DEMO

USED = f"""
import gc, os, sys
import numpy as np
from tarflow.runtime.backend import Branches
from tarflow.runtime.flow import Flow, Guidance

flow = Flow.open({str(DEMO)!r}, sys.argv[1], threads=2)
z, branches = flow.noise(0, range(8)), Branches.plain(np.full(8, 3), flow.config.tokens)

def everything():
    drawn = flow.sample(20, labels=3, guidance=Guidance(1.0), seed=7, certify=True, reproducible=True)
    latent, _ = flow.encode(drawn, 3)
    divided = [flow.lanes.solve(0, z, branches)] if flow.lanes else []
    return [np.asarray(drawn), drawn.certificate, drawn.log_prob, latent, *divided]

def same(found):
    return all(map(np.array_equal, found, expected))

expected = everything()
child = os.fork()
if not child:
"""
PARENT = """
_, status = os.waitpid(child, 0)
assert status == 0, status
assert same(everything())
"""


LIVES = {
    "used": "assert same(everything())\n    os._exit(0)",  # as multiprocessing ends its children
    "used and ended": "assert same(everything())\n    sys.exit()",
    "dropped": "del flow\n    gc.collect()\n    sys.exit()",
    "ended": "sys.exit()",
}


@pytest.mark.parametrize(
    ("provider", "life"), [*(("cpu", life) for life in LIVES), ("native", "used and ended"), ("native", "dropped")]
)
def test_a_flow_that_was_used_is_whole_in_a_forked_process(provider: str, life: str) -> None:
    quiet = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}  # it has threads of its own, for which a child waits at its end
    code = f"{USED}    {LIVES[life]}\n{PARENT}"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, provider]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet, start_new_session=True)
    try:
        _, told = process.communicate(timeout=1800)  # a child that hangs, however busy the machine is
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told
