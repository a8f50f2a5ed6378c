"""The service under load on loopback: throughput beside the bare Flow, then far more connections than it takes.

    python -m bench.serve [--seconds 60] [--bundle BUNDLE]

Every accepted answer is compared, bit for bit, with what Flow.sample(reproducible=True) draws. Prints a section of
Markdown; exits with 1 if an answer was wrong, lost or neither 200 nor 429.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.machine import cores

DEMO = Path(__file__).parent.parent / "tarflow" / "demo"
CONNECTIONS = 64
QUEUE = 64
BATCH = 64
KNOWN = 256  # samples whose bits are known beforehand
SEED = 7
ROUNDS = 4  # bare flow and service by turns


@dataclass
class Outcome:
    """What a load brought back."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    without_retry: int = 0
    wall: float = 0.0

    @property
    def rate(self) -> float:
        return self.statuses[200] / self.wall

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q)) if self.seconds else float("nan")


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[str]
    port: int

    def memory(self) -> float:
        """Resident MiB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def service(bundle: Path, *arguments: object) -> Iterator[Service]:
    """``tarflow serve`` on a free port; ended by SIGTERM."""
    command = [sys.executable, "-m", "tarflow.cli.main", "serve", str(bundle), "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield Service(process, int(line.split()[2].rsplit(":", 1)[1]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def request_of(index: int, guidance: float) -> bytes:
    body = json.dumps(
        {"seed": SEED, "first_sample": index, "labels": index % 10, "guidance": guidance, "format": "npy"}
    ).encode()
    head = (
        f"POST /v1/samples HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes, bytes]:
    """One request on a connection that stays: status, head, body."""
    writer.write(request)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    at = lower.index(b"content-length:")
    length = int(lower[at + 15 : lower.index(b"\r", at)])
    return int(head.split(b" ", 2)[1]), lower, await reader.readexactly(length)


async def client(port: int, start: int, until: float, expected: list[bytes], guidance: float, out: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    index = start
    while time.perf_counter() < until:
        index = (index + 17) % KNOWN
        started = time.perf_counter()
        status, head, body = await ask(reader, writer, request_of(index, guidance))
        out.statuses[status] += 1
        if status == 200:
            out.seconds.append(time.perf_counter() - started)
            out.wrong += body != expected[index]
        else:
            out.without_retry += b"retry-after:" not in head
            await asyncio.sleep(0.2)
    writer.close()


async def load(port: int, connections: int, seconds: float, expected: list[bytes], guidance: float) -> Outcome:
    out = Outcome()
    started = time.perf_counter()
    await asyncio.gather(*(client(port, 5 * k, started + seconds, expected, guidance, out) for k in range(connections)))
    out.wall = time.perf_counter() - started
    return out


def npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(image))
    return file.getvalue()


def bare(flow: Flow, seconds: float, guidance: float, reproducible: bool, workers: int = 1) -> float:
    """Samples a second of the flow alone, in batches of BATCH, by so many threads at a time."""
    labels, started = np.arange(BATCH) % 10, time.perf_counter()

    def draw(worker: int) -> int:
        drawn = 0
        while drawn == 0 or time.perf_counter() - started < seconds:
            flow.sample(BATCH, labels=labels, guidance=Guidance(guidance), seed=worker, reproducible=reproducible)
            drawn += BATCH
        return drawn

    with ThreadPoolExecutor(workers) as pool:
        drawn = sum(pool.map(draw, range(workers)))
    return drawn / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--bundle", type=Path, default=DEMO)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=min(2, cores()), help="of the service")
    said = parser.parse_args()
    flow, narrow = Flow.open(said.bundle), Flow.open(said.bundle, threads=max(1, cores() // said.workers))
    labels = np.arange(KNOWN) % 10
    known = flow.sample(KNOWN, labels=labels, guidance=Guidance(said.guidance), seed=SEED, reproducible=True)
    expected = [npy(np.asarray(known)[i : i + 1]) for i in range(KNOWN)]
    rates: dict[str, list[float]] = {"batch": [], "tiles": [], "workers": [], "service": []}
    whole, memory, turn = Outcome(), [], said.seconds / ROUNDS / 3
    with service(said.bundle, "--queue", QUEUE, "--batch", BATCH, "--workers", said.workers) as running:
        asyncio.run(load(running.port, CONNECTIONS, 2, expected, said.guidance))  # warm
        memory.append(running.memory())
        for _ in range(ROUNDS):
            rates["batch"].append(bare(flow, turn, said.guidance, False))
            rates["tiles"].append(bare(flow, turn, said.guidance, True))
            rates["workers"].append(bare(narrow, turn, said.guidance, True, said.workers))
            out = asyncio.run(load(running.port, CONNECTIONS, said.seconds / ROUNDS, expected, said.guidance))
            rates["service"].append(out.rate)
            whole = Outcome(
                whole.seconds + out.seconds,
                whole.statuses + out.statuses,
                whole.wrong + out.wrong,
                whole.without_retry + out.without_retry,
                whole.wall + out.wall,
            )
            memory.append(running.memory())
        flood = asyncio.run(load(running.port, 10 * QUEUE, max(5, said.seconds / 6), expected, said.guidance))
        memory.append(running.memory())
    report(whole, flood, rates, memory, said.guidance)
    bad = whole.wrong + flood.wrong + flood.without_retry
    strange = (set(whole.statuses) - {200}) | (set(flood.statuses) - {200, 429})
    sys.exit(1 if bad or strange else 0)


def report(whole: Outcome, flood: Outcome, rates: dict[str, list[float]], memory: list[float], guidance: float) -> None:
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    ratio = {
        name: float(np.median([s / b for s, b in zip(rates["service"], rates[name], strict=True)]))
        for name in ("batch", "tiles", "workers")
    }
    print(
        f"""## The service under load

Loopback, {CONNECTIONS} connections that each ask for one sample at a time, guidance {guidance:g}, the client on the
same cores; bare Flow and service by turns, {ROUNDS} rounds, medians. Every answer was compared with its seed's sample,
bit for bit.

| | samples/s | service's ratio to it |
|---|---|---|
| service | {middle["service"]:.0f} | |
| bare Flow, batch {BATCH}, reproducible (what the service promises) | {middle["tiles"]:.0f} | {ratio["tiles"]:.2f} |
| bare Flow, batch {BATCH}, bits that depend on the batch | {middle["batch"]:.0f} | {ratio["batch"]:.2f} |
| bare Flow, batch {BATCH}, reproducible, in as many threads as the service has workers | {middle["workers"]:.0f} | \
{ratio["workers"]:.2f} |

| load | answers | wrong | 429 | other | p50 | p99 |
|---|---|---|---|---|---|---|
{row(f"{CONNECTIONS} connections, {whole.wall:.0f} s", whole)}
{row(f"{10 * QUEUE} connections (10 times the queue), {flood.wall:.0f} s", flood)}

Resident memory, MiB: {", ".join(f"{size:.0f}" for size in memory)} (warm, after each round, after the flood).
"""
    )


def row(name: str, out: Outcome) -> str:
    other = sum(count for status, count in out.statuses.items() if status not in (200, 429))
    return (
        f"| {name} | {out.statuses[200]} | {out.wrong} | {out.statuses[429]} | {other} | "
        f"{out.quantile(0.5) * 1000:.0f} ms | {out.quantile(0.99) * 1000:.0f} ms |"
    )


if __name__ == "__main__":
    main()
