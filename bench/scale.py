"""Shards at length: the same bits from one process and from Ray, through kills at random moments; what a shard costs.

    python -m bench.scale [--samples 20000] [--kills 20] [--seed 0]

Needs the extra [ray]. Everything is drawn from the demo into a temporary folder; takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from tarflow.runtime.flow import Flow
from tarflow.runtime.image import png, to_uint8
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import Request
from tarflow.shards.folder import claimed, write_index
from tarflow.shards.job import Job
from tarflow.shards.record import Record, finished
from tarflow.shards.workers import Local, Solo, Task, carry_out

DEMO = Path(__file__).parent.parent / "tarflow" / "demo"


def contents(folder: Path) -> dict[str, str]:
    """Hash by name of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(out: Path, samples: int, shard: int, *options: str) -> list[str]:
    job = ("--n", str(samples), "--labels", "0-9", "--shard-size", str(shard), "--out", str(out))
    return [sys.executable, "-m", "tarflow.cli.main", "generate", str(DEMO), *job, *options]


def timed(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def same_bits(folder: Path, samples: int) -> Path:
    """One process, two local ones, two Ray workers; the folder of the first."""
    ways = {
        "one process": ("--threads", "2", "--no-spinning"),
        "two processes": ("--workers", "2"),
        "two Ray workers": ("--ray", "--workers", "2"),
    }
    first: Path | None = None
    for name, options in ways.items():
        out = folder / name.replace(" ", "-")
        seconds = timed(command(out, samples, 1024, *options))
        first = first or out
        equal = contents(out) == contents(first)
        print(f"{samples} samples, {name}: {seconds:.1f} s, {samples / seconds:.0f} a second; same files: {equal}")
        assert equal
    assert first is not None
    return first


def below(pid: int) -> list[int]:
    """Processes started by ``pid`` and by those, whose command line says that they draw: workers, not Ray's own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                line = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if parent == pid:
                wanted = b"spawn_main" in line or b"ray::_Actor" in line
                found += ([int(entry.name)] if wanted else []) + below(int(entry.name))
    return found


def kills(folder: Path, runs: int, seed: int, samples: int = 3200, shard: int = 32) -> None:
    """Runs that lose workers or their driver to SIGKILL, twice each, until each job is whole and right. A kill falls at
    a random moment after a random number of finished shards; one that comes too late does not count.
    """
    chance, whole = random.Random(seed), folder / "undisturbed"
    fast = ("--no-certify", "--no-denoise")
    timed(command(whole, samples, shard, *fast, "--workers", "2"))
    expected = contents(whole)
    hits = Counter[str]()
    for run in range(runs):
        way = ("--ray", "--workers", "2") if run % 2 else ("--workers", "2")
        whom = "driver" if run % 4 < 2 else "worker"
        moments = sorted(chance.randrange(samples // shard * 4 // 5) for _ in range(2))
        out = folder / f"killed-{run}"
        hit, drawn = disturbed(command(out, samples, shard, *fast, *way, "--json"), out, whom, moments, chance)
        hits[whom] += hit
        found = contents(out)
        assert found == expected, f"run {run}: {sorted(set(found) ^ set(expected))[:5]}"
        index = json.loads((out / "index.json").read_text())
        covered = [i for s in index["shards"] for i in range(s["first_sample"], s["first_sample"] + s["samples"])]
        assert covered == list(range(samples)), "lost or doubled"
        kind = "Ray" if run % 2 else "local"
        print(f"run {run}: {hit} times a {whom} of {kind} workers killed, after {moments} shards; the last run drew "
              f"{drawn}; all files the same", flush=True)  # fmt: skip
    print(f"{runs} runs, {hits['driver']} drivers and {hits['worker']} workers killed: nothing lost, nothing doubled")


def disturbed(job: list[str], out: Path, whom: str, moments: list[int], chance: random.Random) -> tuple[int, int]:
    """Run a job to its end through a kill after each number of shards. Returns kills that hit, and the number of
    shards that the last run drew.
    """
    hits, process = 0, start(job)
    for shards in moments:
        wait_for(out, process, shards)
        time.sleep(chance.uniform(0.0, 0.1))
        victims = [process.pid] if whom == "driver" else below(process.pid)
        if process.poll() is None and victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
            hits += 1
        if whom == "driver":
            process.communicate()
            process = start(job)
    answer, _ = process.communicate()
    assert process.returncode == 0
    return hits, json.loads(answer)["drawn"]


def start(job: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_for(out: Path, process: subprocess.Popen[bytes], shards: int) -> None:
    """Until so many shards are finished, or the run is over."""
    while process.poll() is None and len(list((out / "records").glob("*.json"))) < shards:
        time.sleep(0.02)


def overhead(folder: Path) -> None:
    """Milliseconds a shard beyond its sampling: written, hashed, recorded, of this process's own time; handed out by
    each crew, on the clock; found again.
    """
    import tarflow.shards.cluster as cluster

    flow = Flow.open(DEMO, "cpu", threads=1)
    base = Job.of(flow.bundle, Request(16 * 100, denoise=False), shard_size=16)
    own, clock = list[float](), list[float]()
    for shard in base.shards():
        before = time.process_time(), time.perf_counter()
        flow.sample(16, first_sample=shard.first, denoise=False, reproducible=True)
        own.append(time.process_time() - before[0])
        clock.append(time.perf_counter() - before[1])
    print(f"shards of 16, bare sampling: {median(own) * 1e3:.1f} ms of its own, {median(clock) * 1e3:.1f} on the clock")
    for form in ("npy", "safetensors", "png", "tar"):
        job, out = replace(base, format=form), folder / f"overhead-{form}"
        print(f"  {form}: {1e3 * (between_shards(job, out, 'solo') - median(own)):.1f} ms more a shard")
    with cluster.connected("local"):
        for crew in ("local", "ray"):
            each = between_shards(base, folder / f"overhead-{crew}", crew)
            print(f"  npy, one {crew} worker: {1e3 * (each - median(clock)):.1f} ms more a shard, on the clock")
    started = time.perf_counter()
    assert all(finished(folder / "overhead-npy", base, shard) for shard in base.shards())
    print(f"  found finished again: {(time.perf_counter() - started) * 10:.2f} ms a shard")


def between_shards(job: Job, out: Path, kind: str) -> float:
    """Seconds from one finished shard to the next, the median, for a crew of one."""
    import tarflow.shards.cluster as cluster

    task, moments, records = Task(job, DEMO, out, Opening("cpu", threads=1)), list[float](), list[Record]()
    clock = time.process_time if kind == "solo" else time.perf_counter

    def done(record: Record) -> None:
        moments.append(clock())
        records.append(record)

    with claimed(out, job):
        crew = (
            Solo(task)
            if kind == "solo"
            else Local(task, 1)
            if kind == "local"
            else cluster.RayCrew(task, cluster.Share(1, 1, 1, 0), print)
        )
        try:
            carry_out(crew, job.shards(), done)
        finally:
            crew.close()
        write_index(out, job, records)
    return float(median(np.diff(moments)))


def writing(folder: Path) -> None:
    """What one core encodes and what the disk takes, for images of 64x64 and 256x256 in colour, noisy ones."""
    for size in (64, 256):
        images = np.random.default_rng(0).normal(0, 0.4, (64, 3, size, size)).astype(np.float32)
        smooth = np.repeat(np.repeat(images[:, :, ::8, ::8], 8, 2), 8, 3) + images * 0.05  # photographs are in between
        for name, these in (("noise", images), ("smooth", smooth)):
            started = time.process_time()  # of one core, whatever else runs here
            files = [png(image.transpose(1, 2, 0), {}) for image in to_uint8(these)]
            seconds = time.process_time() - started
            each = sum(map(len, files)) / len(files)
            print(f"PNG {size}x{size}x3, {name}: {64 / seconds:.0f} a second and core, {each / 1e3:.1f} kB each")
        array = np.repeat(images, max(1, (256 << 20) // images.nbytes), 0)
        started = time.perf_counter()
        with (folder / "array.npy").open("wb") as file:
            np.save(file, array)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        print(f"npy {size}x{size}x3: {len(array) / seconds:.0f} a second, {array.nbytes / seconds / 1e6:.0f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("bits", "kills", "overhead", "writing"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as name:
        folder = Path(name)
        if options.only in (None, "writing"):
            writing(folder)
        if options.only in (None, "overhead"):
            overhead(folder)
        if options.only in (None, "bits"):
            same_bits(folder, options.samples)
        if options.only in (None, "kills"):
            kills(folder, options.kills, options.seed)


if __name__ == "__main__":
    main()
