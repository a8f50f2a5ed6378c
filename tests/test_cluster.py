"""Shards drawn by Ray's actors: the same files, whoever of them dies. One local Ray for all tests here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from tarflow.runtime.errors import BundleError, MachineError
from tarflow.runtime.flow import Flow
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import Request
from tarflow.shards import cluster
from tarflow.shards.folder import INDEX, claimed, write_index
from tarflow.shards.job import Job, Shard
from tarflow.shards.record import Record
from tarflow.shards.workers import Task, carry_out

from .conftest import DEMO, Cli
from .test_shards import ARGUMENTS, check_stop, contents, run, wait_for_shards, whole


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """A Ray of this machine alone, of a user who never had one."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(home))
        with cluster.connected("local"):
            assert sys.stdout is sys.stderr, "what Ray prints would be in the way of --json"
            yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def flow() -> Flow:
    """The demo on ONNX Runtime, which draws jobs that record no engine."""
    return Flow.open(DEMO, "cpu", threads=1)


@pytest.fixture
def job(flow: Flow) -> Job:
    return Job.of(flow.bundle, Request(80, (0, 1, 2), first_sample=20, certify=True), shard_size=16)


def crew_of(size: int, task: Task) -> cluster.RayCrew:
    return cluster.RayCrew(task, cluster.Share(size, 1, 0.5, 0), print)


def draw_with(crew: cluster.RayCrew, job: Job, folder: Path) -> None:
    records: list[Record] = []
    try:
        with claimed(folder, job):
            carry_out(crew, job.shards(), records.append)
            write_index(folder, job, sorted(records, key=lambda record: record.first_sample))
    finally:
        crew.close()


def test_two_workers_one_of_them_killed_write_what_one_process_writes(
    address: str, flow: Flow, job: Job, tmp_path: Path
) -> None:
    class Deadly(cluster.RayCrew):
        """Kills the first worker that is handed a shard, while it draws."""

        killed = 0

        def hand(self, worker: int, shard: Shard) -> None:
            super().hand(worker, shard)
            if not self.killed:
                ray.kill(self._actors[worker])
                self.killed += 1

    task = Task(job, DEMO, tmp_path / "ray", Opening(memory="least"))
    crew = Deadly(task, cluster.Share(2, 1, 0.5, 0), print)
    draw_with(crew, job, tmp_path / "ray")
    assert crew.killed == 1
    whole(flow, job, tmp_path / "alone", job.shards())
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")


def test_a_bundle_that_a_worker_does_not_see_or_sees_another_of_is_named(
    address: str, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"on .*no bundle at '/nowhere'"):
        draw_with(crew_of(1, Task(job, Path("/nowhere"), tmp_path / "out", Opening())), job, tmp_path / "out")
    other = replace(job, bundle="0" * 64)
    with pytest.raises(BundleError, match=r"is another bundle.*put the bundle where every machine sees it"):
        draw_with(crew_of(1, Task(other, DEMO, tmp_path / "out", Opening())), other, tmp_path / "out")
    with pytest.raises(MachineError, match="put it where every machine sees it"):
        draw_with(crew_of(1, Task(job, DEMO, tmp_path / "elsewhere", Opening())), job, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_is_killed_on_a_cluster_is_continued_by_another(address: str, cli: Cli, tmp_path: Path) -> None:
    options = ("--n", 400, "--shard-size", 16, "--no-certify", "--no-denoise")
    killed = run(*options, "--out", tmp_path / "ray", "--ray", address, "--workers", 2)
    wait_for_shards(tmp_path / "ray", 3)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "ray" / INDEX).exists()
    again = cli(*ARGUMENTS, *options, "--out", tmp_path / "ray", "--ray", address, "--workers", 2, "--json")
    assert again.returncode == 0, again.stderr
    assert 48 <= json.loads(again.stdout)["kept"] < 400


def test_sigterm_on_a_cluster_keeps_finished_shards_and_says_how_to_go_on(address: str, tmp_path: Path) -> None:
    check_stop(run("--n", 100_000, "--shard-size", 16, "--out", tmp_path / "out", "--ray", address), tmp_path / "out")


def test_a_ray_of_ones_own_has_a_token_and_leaves_none_behind(
    address: str, home: Path, cli: Cli, tmp_path: Path
) -> None:
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = cli(*ARGUMENTS, "--out", tmp_path / "out", "--ray", address, env=stranger)
    assert done.returncode == 3
    assert f"the Ray cluster at '{address}' asks for a token" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert not (home / ".ray").exists()


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [([4], None, 4), ([8, 4], None, 4), ([8, 4], 3, 4), ([2, 64, 64, 64], None, 32), ([2], 8, 1), ([3, 3], 4, 1)],
)
def test_a_worker_s_cores_are_those_of_one_machine(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], workers: int | None, each: int
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(n)}} for n in nodes])
    parts = cluster.share(workers, Opening(), 100)
    assert (parts.workers, parts.threads) == (workers or len(nodes), each)
    assert sum(int(n / parts.cpus) for n in nodes) >= parts.workers, "each of them has a place"
    with pytest.raises(MachineError, match="needs GPUs, and Ray knows of none"):
        cluster.share(workers, Opening("cuda"), 100)


def test_no_cluster_at_an_address_is_said_at_once(cli: Cli, tmp_path: Path) -> None:
    done = cli(*ARGUMENTS, "--out", tmp_path / "out", "--ray", "127.0.0.1:9")
    assert done.returncode == 3
    assert "no Ray cluster at '127.0.0.1:9'" in done.stderr
    assert not (tmp_path / "out").exists()
