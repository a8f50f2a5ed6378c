"""Three hosts draw one job: a worker killed, a host cut off, a host lost, and every file is as one process draws it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Cli
from .hosts import JOB, apart
from .test_shards import contents


def test_a_worker_killed_a_host_cut_off_a_host_lost_change_no_file(cli: Cli, tmp_path: Path) -> None:
    if not shutil.which("ip") or subprocess.run(apart("true"), capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here: this needs root and iproute2")
    command = apart(sys.executable, "-m", "tests.hosts", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    logs = "".join(path.read_text() for path in tmp_path.glob("?/*") if path.is_file())
    assert done.returncode == 0, done.stderr + logs
    seen = json.loads(done.stdout)
    assert seen["exit code without a token"] == 3
    assert "asks for a token" in logs
    assert seen["killed workers"] >= 1, logs
    assert seen["processes of the lost host"] > 0
    assert seen["shards when it was lost"] < 80, "there was work left"
    assert seen["exit code"] == 0, logs
    assert cli("generate", *JOB, "--out", tmp_path / "alone").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
