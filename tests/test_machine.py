"""What a machine is, and how much of it is ours: quotas of control groups, and systems that are not Linux."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tarflow.runtime.machine import cores, cores_each, cpu_quota

from .conftest import DEMO

V2 = "0::/system.slice/tarflow.service\n"
V1 = "7:memory:/pods/x\n3:cpu,cpuacct:/pods/x\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        (V2, {"system.slice/tarflow.service/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"system.slice/tarflow.service/cpu.max": "max 100000\n"}, None),
        (V2, {"system.slice/cpu.max": "150000 100000\n", "system.slice/tarflow.service/cpu.max": "max 100000"}, 1.5),
        (V2, {"system.slice/cpu.max": "150000 100000\n", "system.slice/tarflow.service/cpu.max": "90000 30000"}, 1.5),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),  # a container's own view
        (V1, {"cpu,cpuacct/pods/x/cpu.cfs_quota_us": "25000", "cpu,cpuacct/pods/x/cpu.cfs_period_us": "50000"}, 0.5),
        (V1, {"cpu/pods/x/cpu.cfs_quota_us": "25000\n", "cpu/pods/x/cpu.cfs_period_us": "50000\n"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "50000"}, 0.5),  # of a container again
        (V1, {"cpu/pods/x/cpu.cfs_quota_us": "-1", "cpu/pods/x/cpu.cfs_period_us": "100000"}, None),
        (V1, {"memory/pods/x/cpu.cfs_quota_us": "25000", "memory/pods/x/cpu.cfs_period_us": "50000"}, None),
        (V1, {}, None),
    ],
)
def test_the_tightest_quota_of_a_group_and_those_around_it_counts(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    shown = {"proc/self/cgroup": membership} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in shown.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
    usable = len(os.sched_getaffinity(0))
    assert cores(tmp_path) == (usable if quota is None else max(1, min(usable, int(quota))))


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group worth 1.5 cores; a line of skip where none can be made."""
    top = Path("/sys/fs/cgroup")
    folder = (top / "cpu" if (top / "cpu").is_dir() else top) / f"tarflow-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text("150000 100000")
        elif (folder / "cpu.cfs_quota_us").exists():
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text("150000")
        else:
            pytest.skip("control groups here do not divide processor time")
        yield folder
    finally:
        folder.rmdir()


def test_a_real_quota_decides_how_many_threads_a_bundle_is_opened_with(group: Path) -> None:
    code = (
        "import json\nfrom tarflow.runtime.flow import Flow\nfrom tarflow.runtime.machine import cores, cpu_quota\n"
        f"backend = Flow.open({str(DEMO)!r}, provider='cpu').backend\n"
        "threads = backend.sessions.get(0, 'step').get_session_options().intra_op_num_threads\n"
        "print(json.dumps([cpu_quota(), cores(), threads, backend.machine]))"
    )
    quota, count, threads, machine = json.loads(inside(group, "-c", code))
    assert (quota, count, threads) == (1.5, 1, 1)
    assert machine.endswith(", 1 threads")
    told = json.loads(inside(group, "-m", "tarflow.cli.main", "doctor", "--json"))
    assert (told["cores"], told["cpu_quota"], told["threads"]) == (os.cpu_count(), 1.5, 1)


def inside(group: Path, *arguments: str) -> str:
    """What Python prints, run in a control group."""
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    done = subprocess.run(["sh", "-c", enter, "sh", sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


ELSEWHERE = """
import ctypes, os, resource, sys, sysconfig
import numpy, onnxruntime
from tarflow.runtime.memory import peak

def hide(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "there is no such thing here", arguments[0])
    if event == "ctypes.dlsym" and arguments[1] == "renameat2":
        raise AttributeError(arguments[1])

usage = resource.getrusage
resource.getrusage = lambda who: resource.struct_rusage((*usage(who)[:2], usage(who).ru_maxrss << 10, *usage(who)[3:]))
sys.addaudithook(hide)
sysconfig.get_config_vars()  # of the Python that really runs
sys.platform = "darwin"
sys.modules["fcntl"] = None  # only shards need it
del os.sched_getaffinity
assert usage(resource.RUSAGE_SELF).ru_maxrss <= peak() >> 10 <= usage(resource.RUSAGE_SELF).ru_maxrss

from tarflow.cli.main import main
sys.argv = ["tarflow", "generate", "--n", "16", "--labels", "0-9", "-o", "grid.png", "--save", "samples.npy", "--json"]
main()
"""


def test_nothing_in_the_runtime_needs_linux(tmp_path: Path) -> None:
    """Its files and calls are hidden; memory is counted in the units of macOS."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["certificate"]["max"] < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "samples.npy"}


def test_a_share_of_the_cores_is_one_that_every_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.runtime.machine.cores", lambda: 200)
    assert [cores_each(count) for count in (0, 1, 2, 10, 300)] == [64, 64, 64, 20, 1]
