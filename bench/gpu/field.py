"""Who takes part in the bench of a device: PyTorch as published, PyTorch at its best, and this runtime in its modes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.model import TarFlow
from tarflow.rivals import Compiled, grown, published, published_steps
from tarflow.runtime.backend import Array
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.measure import Contender, of_flow

from .opening import resident_flow

PUBLISHED = "PyTorch as published, bf16"
COMPILED = "PyTorch compiled, CUDA graph, fp16"


@dataclass(frozen=True, slots=True)
class Task:
    """What all must draw: noise (B, T, D), labels (B,) and a guidance scale."""

    noise: Array
    labels: NDArray[np.int64]
    guidance: float


@dataclass(frozen=True, slots=True)
class Choice:
    """How much of the field takes part. ``stretch``: positions timed at a time of a method too slow to time whole;
    ``patience``: seconds a run of it may take to be run whole once, for its error.
    """

    device: str
    compiled: bool = True
    tensorrt: bool = True
    stretch: int = 32
    patience: float = 60.0


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contender, and how it is timed: ``seconds`` of a whole task, measured or ``estimated`` from stretches of it.

    ``role`` is "published" or "compiled" for the two that the others are compared with.
    """

    contender: Contender
    seconds: Callable[[Task], float]
    role: str = ""
    estimated: bool = False

    @property
    def name(self) -> str:
        return self.contender.name

    def draw(self, task: Task) -> Array:
        """Raw samples, images."""
        return self.contender.draw(task.noise, task.labels, Guidance(task.guidance))


class Rivals:
    """PyTorch on one device: the model in float32, which is the truth, and what is timed against."""

    def __init__(self, model: TarFlow, choice: Choice) -> None:
        self.choice, self.model = choice, model.to(choice.device)
        self._half: TarFlow | None = None

    def truth(self, task: Task) -> Array:
        """Raw samples in float32, positions one by one against a cache that is there from the beginning."""
        images: Array = self.model.decode(*self._tensors(task), task.guidance).cpu().numpy()
        return images

    def published(self) -> Entrant:
        def decode(noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
            with torch.autocast(self.choice.device, torch.bfloat16):
                return published(self.model, noise, labels, guidance)

        return Entrant(self._contender(PUBLISHED, decode), self._published_seconds, "published", estimated=True)

    def compiled(self) -> Entrant:
        if self._half is None:
            self._half = copy.deepcopy(self.model).half()
        torch.compiler.reset()  # else its limit of recompilations makes later sizes eager without a word
        name = COMPILED if self.choice.compiled else COMPILED.replace("compiled", "not compiled")
        if self.choice.device != "cuda":
            name = name.replace("CUDA graph", "static cache")
        return timed(self._contender(name, Compiled(self._half, self.choice.compiled)), "compiled")

    def _contender(self, name: str, decode: Callable[[Tensor, Tensor | None, float], Tensor]) -> Contender:
        def draw(noise: Array, labels: NDArray[np.int64], guidance: Guidance) -> Array:
            found = decode(*self._tensors(Task(noise, labels, guidance.scale)), guidance.scale)
            images: Array = self.model.unpatchify(found.float()).cpu().numpy()  # ends when the device has
            return images

        return Contender(name, draw)

    def _tensors(self, task: Task) -> tuple[Tensor, Tensor | None]:
        labels = torch.from_numpy(task.labels).to(self.choice.device) if self.model.config.classes else None
        return torch.from_numpy(task.noise).to(self.choice.device), labels

    def _published_seconds(self, task: Task) -> float:
        """Steps at the beginning, in the middle and at the end of one block, times all steps of all blocks: what a step
        costs grows linearly with its position, so the three have the mean of all.
        """
        steps, block = self.model.config.tokens - 1, self.model.blocks[0]
        noise, labels = self._tensors(task)
        with torch.inference_mode(), torch.autocast(self.choice.device, torch.bfloat16):
            costs = []
            for places in stretches(steps, self.choice.stretch):
                x, caches = noise.clone(), grown(block, len(noise), places.start, noise.bfloat16())
                wait(self.choice.device)
                started = time.perf_counter()
                published_steps(block, x, labels, task.guidance, caches, places)
                wait(self.choice.device)
                costs.append((time.perf_counter() - started) / len(places))
        return mean(costs) * steps * self.model.config.blocks


def wait(device: str) -> None:
    """Until everything launched has ended."""
    if device == "cuda":
        torch.cuda.synchronize()


def stretches(steps: int, length: int) -> list[range]:
    """The first, the middle and the last ``length`` of so many steps; all of them where that is no more."""
    if 3 * length >= steps:
        return [range(steps)]
    return [range(start, start + length) for start in (0, (steps - length) // 2, steps - length)]


def ours(bundle: Bundle, choice: Choice) -> dict[str, Callable[[str], tuple[Flow, list[Entrant]]]]:
    """This runtime, by name: each opens a flow and returns it with the modes that take part."""

    def entrants(name: str, flow: Flow, *modes: str) -> tuple[Flow, list[Entrant]]:
        return flow, [timed(of_flow(flow, f"{name}, {mode}", mode)) for mode in modes]

    def onnxruntime(cuda_graph: bool) -> Flow:
        return resident_flow(bundle, choice.device, cuda_graph)

    usual = f"tarflow, ONNX Runtime {choice.device}"
    found = {usual: lambda name: entrants(name, onnxruntime(True), "serial", "exact", "fast")}
    if choice.device == "cuda":
        found[f"{usual} without CUDA graphs"] = lambda name: entrants(name, onnxruntime(False), "serial")
        if choice.tensorrt:
            found["tarflow, TensorRT"] = lambda name: entrants(name, Flow.open(bundle, "tensorrt"), "serial", "fast")
    return found


def timed(contender: Contender, role: str = "") -> Entrant:
    """Timed as it draws. What is drawn is numpy, so it has left the device when it is there."""

    def seconds(task: Task) -> float:
        started = time.perf_counter()
        contender.draw(task.noise, task.labels, Guidance(task.guidance))
        return time.perf_counter() - started

    return Entrant(contender, seconds, role)


def bandwidth(device: str, size: int, repeats: int = 9) -> float:
    """Bytes per second of the device's memory: the better of reading (a sum) and of copying, medians."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 1):
            wait(device)
            started = time.perf_counter()
            run()
            wait(device)
            times.append(time.perf_counter() - started)
        return median(times[1:])

    return max(source.nbytes / seconds(source.sum), 2 * source.nbytes / seconds(lambda: target.copy_(source)))


def floor_bytes(model: TarFlow, rows: int) -> float:
    """Bytes that a step of half precision must read, on average: one block's matrices once, and for each of so many
    rows (images times branches) the keys and values of the positions that are known, half of all.
    """
    config, block = model.config, model.blocks[0]
    matrices = sum(m.weight.numel() + m.bias.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    return 2 * matrices + rows * 2 * (2 * config.layers * config.width) * config.tokens / 2
