"""Hostile clients beside honest ones, against a real ``tarflow serve`` on loopback: who is honest notices little."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.torture.commands import environment, line
from bench.torture.hostile import TROUBLES, Target, Trouble
from bench.torture.report import Section
from tarflow.runtime.flow import Flow

DEMO = Path(__file__).parent.parent.parent / "tarflow" / "demo"
HONEST = 4
SLOWER = 5.0  # times the quiet p99 that an honest answer may take
ABOVE = 300.0  # MiB above the idle server
KNOWN = 64  # samples whose bits are known beforehand
SEED = 7
ABOUT = (
    "{seconds} s of hostile clients (slow heads, half requests, bombs, floods, cut streams, wrong types) beside 4 "
    "honest ones that each ask for one sample after the other, against a real server on loopback, all on the same "
    "cores; before that the honest ones alone. A fault is an honest request that is not answered with the sample's "
    "bits, perhaps after it was told to wait; an honest p99 above {slower:g} times the quiet one; memory more than "
    "{above:g} MiB above the idle server's, or in the last tenth of the time above the first tenth's by more than 10 % "
    "and 20 MiB; an end that is not clean."
)


@dataclass
class Honest:
    """What the honest clients saw."""

    seconds: list[float] = field(default_factory=list)
    waits: int = 0  # 429 or 503, with Retry-After
    wrong: Counter[str] = field(default_factory=Counter)

    def p99(self) -> float:
        return float(np.quantile(self.seconds, 0.99)) if self.seconds else float("inf")


@dataclass
class Seen:
    """All of it: by phase what honest clients saw, and the server's resident MiB, second by second."""

    quiet: Honest = field(default_factory=Honest)
    beset: Honest = field(default_factory=Honest)
    idle: float = 0.0
    memory: list[float] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    code: int | None = None

    def wrong(self) -> Iterator[str]:
        """Sentences about what should not have been, however slow the machine is."""
        for phase, honest in (("quiet", self.quiet), ("beset", self.beset)):
            for what, count in honest.wrong.items():
                yield f"{count} honest requests ({phase}): {what}"
        if self.code != 0:
            yield f"the server ended with {self.code}"

    def faults(self) -> Iterator[str]:
        """All sentences about what should not have been."""
        yield from self.wrong()
        if not self.beset.p99() <= SLOWER * self.quiet.p99():
            yield f"the honest p99 is {self.beset.p99() / self.quiet.p99():.1f} times the quiet one"
        if max(self.memory) > self.idle + ABOVE:
            yield f"the server took {max(self.memory) - self.idle:.0f} MiB more than idle"
        first, last = self._tenths()
        if last > first * 1.1 + 20:
            yield f"memory grew from {first:.0f} to {last:.0f} MiB"

    def _tenths(self) -> tuple[float, float]:
        tenth = max(len(self.memory) // 10, 1)
        return float(np.mean(self.memory[:tenth])), float(np.mean(self.memory[-tenth:]))

    def rows(self) -> list[tuple[object, ...]]:
        first, last = self._tenths()
        memory = (
            f"{self.idle:.0f} idle",
            f"{first:.0f} at first, {max(self.memory):.0f} at most, {last:.0f} in the end",
        )
        return [
            (name, len(h.seconds), h.waits, h.wrong.total(), f"{np.median(h.seconds) * 1e3:.0f} ms",
             f"{h.p99() * 1e3:.0f} ms", mib)
            for name, h, mib in zip(("alone", "beset"), (self.quiet, self.beset), memory, strict=True)
        ]  # fmt: skip


def torture(seconds: int) -> Section:
    """So many seconds of it, told as a section."""
    seen = beset(seconds)
    columns = ("honest clients", "answered", "told to wait", "wrong", "p50", "p99", "server, MiB")
    made = ", ".join(f"{count} {name}" for name, count in seen.troubles.items())
    about = ABOUT.format(seconds=seconds, slower=SLOWER, above=ABOVE) + f" Made were: {made}."
    return Section("Clients", about, columns, seen.rows(), list(seen.faults()))


def beset(seconds: int) -> Seen:
    """So many seconds of it, after a quarter of that, a minute at most, in quiet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    seen = Seen()
    with _server() as (process, target):
        seen.idle = _resident(process)
        asyncio.run(_all(target, process, seen, seconds))
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            seen.code = process.wait(90)
    return seen


@contextlib.contextmanager
def _server() -> Iterator[tuple[subprocess.Popen[str], Target]]:
    command = line("serve", DEMO, "--port", 0)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        yield process, Target("127.0.0.1", int(said.split()[2].rsplit(":", 1)[1]))
    finally:
        process.kill()
        process.communicate()


async def _all(target: Target, process: subprocess.Popen[str], seen: Seen, seconds: int) -> None:
    expected = _expected()
    await _honest(target, expected, seen.quiet, min(seconds / 4, 60))
    until = time.monotonic() + seconds
    troubles = [asyncio.ensure_future(_trouble(t, target, until, seen.troubles)) for t in TROUBLES]
    watch = asyncio.ensure_future(_watch(process, until, seen.memory))
    await _honest(target, expected, seen.beset, seconds)
    for one in troubles:
        one.cancel()
    await asyncio.gather(*troubles, return_exceptions=True)
    await watch


async def _trouble(trouble: Trouble, target: Target, until: float, made: Counter[str]) -> None:
    dice = random.Random(trouble.__name__)
    while time.monotonic() < until:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await trouble(target, dice)
        made[trouble.__name__.replace("_", " ")] += 1
        await asyncio.sleep(0)


async def _watch(process: subprocess.Popen[str], until: float, memory: list[float]) -> None:
    while time.monotonic() < until:
        memory.append(_resident(process))
        await asyncio.sleep(1)


def _resident(process: subprocess.Popen[str]) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


# --- honest ---------------------------------------------------------------------------------------------------------


def _expected() -> list[bytes]:
    """The answers, by sample index: .npy files."""
    flow = Flow.open(DEMO, threads=1)
    samples = np.asarray(flow.sample(KNOWN, labels=np.arange(KNOWN) % 10, seed=SEED, reproducible=True))
    return [_npy(samples[i : i + 1]) for i in range(KNOWN)]


def _npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(image))
    return file.getvalue()


async def _honest(target: Target, expected: list[bytes], saw: Honest, seconds: float) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(_client(target, expected, saw, until, 16 * k) for k in range(HONEST)))


async def _client(target: Target, expected: list[bytes], saw: Honest, until: float, index: int) -> None:
    while time.monotonic() < until:
        index = (index + 1) % KNOWN
        started = time.monotonic()
        fault = await _answered(target, index, expected[index], saw)
        if fault is None:
            saw.seconds.append(time.monotonic() - started)
        else:
            saw.wrong[fault] += 1
        await asyncio.sleep(0.02)


async def _answered(target: Target, index: int, expected: bytes, saw: Honest) -> str | None:
    """Ask until the sample is here; what was wrong if it never was."""
    body = json.dumps({"seed": SEED, "first_sample": index, "labels": index % 10, "format": "npy"}).encode()
    for _ in range(30):
        try:
            async with asyncio.timeout(60), target.connection() as (reader, writer):
                writer.write(target.post("/v1/samples", body))
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split()[0])
                found = await reader.readexactly(length)
        except (OSError, EOFError, TimeoutError) as error:
            return f"no answer ({type(error).__name__})"
        status = int(head.split()[1])
        if status in (429, 503) and b"retry-after:" in head:
            saw.waits += 1
            await asyncio.sleep(int(head.split(b"retry-after:")[1].split()[0]))
            continue
        if status != 200:
            return f"answered {status}"
        return None if found == expected else "another sample"
    return "told to wait 30 times"
