"""Training: maximum likelihood of noise-augmented images (arXiv 2412.06329), resumable bit for bit."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..model import TarFlow, bits_per_dim
from ..runtime.errors import InputError
from ..runtime.files import disk_errors, replacing
from .data import Dataset, Split
from .processes import Interrupt, Ranks
from .recipe import Recipe, Run
from .stream import noisy
from .trainer import Trainer

FINAL_MEASURE = 4096  # noisy held-out images behind the last number, where each needs only a part of a second

LogLine = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: loss in nats per dimension, bits per dimension, and what it wrote.

    ``loss`` and ``bits_per_dim`` are means over the last steps, as logged; None if a finished run has lost its log.
    """

    steps: int
    loss: float | None
    bits_per_dim: float | None
    held_out_bits_per_dim: float | None
    held_out_draws: int
    seconds: float
    files: list[Path]


def train(
    config: Config, data: Dataset, recipe: Recipe, run: Run, watch: Callable[[LogLine], None] = lambda line: None
) -> Result | None:
    """Train a model and write its averaged weights as ``.pth`` and ``.safetensors``, with a log and sample grids.

    Draws depend on the recipe's seed and the position in the stream of examples alone: a run that was stopped and
    resumed ends, on a CPU, with the same bits, and one spread over more processes with the same weights up to rounding.
    ``watch`` is given each line of the log. Ctrl-C, SIGTERM or SIGHUP finishes the step, saves, and raises
    KeyboardInterrupt.
    Under ``torchrun`` all but rank 0 return None. Raises InputError.
    """
    ranks = Ranks.join(run.device)
    try:
        check(config, data, recipe, ranks)
        run.prepare(writes=ranks.rank == 0)
        trainer = Trainer(config, data, recipe, run, ranks)
        if run.resume:
            trainer.restore()
        journal = Journal(trainer, watch)
        with Interrupt() as interrupt:
            while trainer.step < recipe.steps:
                journal.add(trainer.advance())
                between_steps(trainer, journal)
                if ranks.any(interrupt.requested, run.device):
                    if ranks.rank == 0:
                        trainer.save()
                    raise KeyboardInterrupt
        return journal.result() if ranks.rank == 0 else None
    finally:
        ranks.leave()


def between_steps(trainer: Trainer, journal: Journal) -> None:
    """Log, sample and save, where the step's number says so."""
    run = trainer.run

    def due(every: int) -> bool:
        return every > 0 and (trainer.step % every == 0 or trainer.step == trainer.recipe.steps)

    if due(run.log_every) or due(run.evaluate_every):
        journal.write(due(run.evaluate_every))
    if trainer.ranks.rank == 0:
        if due(run.sample_every):
            trainer.sample()
        if due(run.save_every):
            trainer.save()


def check(config: Config, data: Dataset, recipe: Recipe, ranks: Ranks) -> None:
    """Raises InputError where model, data and recipe do not fit together."""
    ours = (config.image_size, config.channels, config.classes)
    theirs = (data.image_size, data.channels, len(data.classes))
    if ours != theirs:
        raise InputError(f"the model is for (size, channels, classes) {ours}; '{data.name}' has {theirs}")
    if recipe.batch_size > len(data.train):
        most = f"{len(data.train)} at most: '{data.name}' has {len(data.train)} images to train on"
        raise InputError.of("batch_size", recipe.batch_size, most)
    if recipe.batch_size % ranks.world:
        raise InputError.of("batch_size", recipe.batch_size, f"a multiple of {ranks.world}, one share a process")
    if config.noise_std is not None and round(config.noise_std, 2) != config.noise_std:
        advice = "more are lost in a .pth checkpoint's name"
        raise InputError.of("noise_std", config.noise_std, "two decimals", advice)


class Journal:
    """Losses as they come, and the lines of the log made from them."""

    def __init__(self, trainer: Trainer, watch: Callable[[LogLine], None]) -> None:
        self.trainer, self.watch = trainer, watch
        self.first, self.began = trainer.step, time.monotonic()
        self.total, self.count = torch.zeros((), device=trainer.run.device), 0
        self.last: LogLine = {}
        if trainer.ranks.rank == 0 and trainer.run.resume:
            self.forget()

    def forget(self) -> None:
        """Drop what was logged after the state that is resumed, for it will be logged again."""
        log, kept = self.trainer.run.log, []
        for text in log.read_text().splitlines() if log.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # cut short when the process was killed
                continue
            if line["step"] <= self.trainer.step:
                kept.append(text)
                self.last = line
        with replacing(log) as file:
            file.write("".join(text + "\n" for text in kept).encode())

    def add(self, loss: Tensor) -> None:
        self.total += loss
        self.count += 1

    def write(self, evaluate: bool) -> None:
        """One line: mean loss since the last line, speed, time left; to ``evaluate``, held-out bits per dimension."""
        trainer, recipe = self.trainer, self.trainer.recipe
        loss = trainer.ranks.mean(self.total / self.count)
        trainer.must_be_finite()
        self.total, self.count = torch.zeros_like(loss), 0
        if trainer.ranks.rank > 0:
            return
        per_step = (time.monotonic() - self.began) / (trainer.step - self.first)
        line: LogLine = {
            "step": trainer.step,
            "loss": round(float(loss), 5),
            "bits_per_dim": round(float(bits_per_dim(loss)), 4),
            "learning_rate": recipe.learning_rate(trainer.step - 1),
            "images_per_second": round(recipe.batch_size / per_step, 1),
            "seconds_left": round(per_step * (recipe.steps - trainer.step)),
        }
        if evaluate and len(trainer.data.held_out):
            line["held_out_bits_per_dim"] = round(measure(trainer.average, trainer.data.held_out), 4)
        append(trainer.run.log, json.dumps(line) + "\n")
        self.last = line
        self.watch(line)

    def result(self) -> Result:
        trainer, held_out = self.trainer, self.trainer.data.held_out
        draws = max(FINAL_MEASURE // len(held_out), 1) if len(held_out) else 0
        return Result(
            steps=trainer.step,
            loss=self.last.get("loss"),
            bits_per_dim=self.last.get("bits_per_dim"),
            held_out_bits_per_dim=measure(trainer.average, held_out, draws) if draws else None,
            held_out_draws=draws,
            seconds=round(time.monotonic() - self.began, 1),
            files=[*trainer.models, *trainer.class_names, trainer.run.state, trainer.run.log],
        )


def append(log: Path, text: str) -> None:
    """Add to a file all of a text, or nothing. Raises MachineError where the disk is full."""
    with disk_errors(log), log.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(text.encode()) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


@torch.no_grad()
def measure(model: TarFlow, split: Split, draws: int = 1, seed: int = 0, batch_size: int = 256) -> float:
    """Mean bits per dimension of 8-bit images under the model, over ``draws`` seeded draws of training noise for each.

    With Gaussian noise this is the density of *noisy* images, comparable between models of one noise only; with
    uniform dequantisation it bounds the bits needed to code the images themselves.
    """
    device, total = model.prior.device, 0.0
    for first in range(0, len(split), batch_size):
        part = split.take(slice(first, first + batch_size))
        images = torch.from_numpy(part.images).to(device)
        labels = None if part.labels is None else torch.from_numpy(part.labels).to(device)
        for draw in range(draws):
            keys = [(seed, "measure", draw, first + i) for i in range(len(part))]
            z, log_det = model.encode(noisy(images, model.config.noise_std, keys), labels)
            total += float(bits_per_dim(model.loss(z, log_det))) * len(part)
    return total / (len(split) * draws)
