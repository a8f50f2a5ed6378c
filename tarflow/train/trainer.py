"""One step of training after the other, and the state between two of them that training can be resumed from."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, class_names
from ..config import Config
from ..model import TarFlow
from ..runtime.claims import check_archive
from ..runtime.errors import InputError
from ..runtime.files import replacing_by_name
from ..runtime.image import grid, write_png
from .data import Dataset
from .processes import Ranks
from .recipe import Recipe, Run
from .stream import Stream, generator

BETAS = (0.9, 0.95)
PRIOR_RATE = 0.1  # of the moving average that a volume-preserving model's prior is


class Trainer:
    """The weights in training, their average, the optimiser, and how many steps they have seen."""

    def __init__(self, config: Config, data: Dataset, recipe: Recipe, run: Run, ranks: Ranks) -> None:
        self.config, self.data, self.recipe, self.run, self.ranks = config, data, recipe, run, ranks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = TarFlow(config).to(run.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=BETAS, weight_decay=recipe.weight_decay
        )
        self.stream = Stream(data.train, config.noise_std, recipe.seed, recipe.drop_label, recipe.flip, recipe.jitter)
        self.bfloat16 = run.use_bfloat16(uniform=config.noise_std is None)
        together = ranks.world > 1
        self.flow: nn.Module = nn.parallel.DistributedDataParallel(self.model) if together else self.model
        self.step = 0
        self.health = torch.zeros((), device=run.device)  # not finite once a loss or gradient was not

    def advance(self) -> Tensor:
        """One step on this process's share of the batch; returns its loss, () in nats per dimension."""
        share = self.recipe.batch_size // self.ranks.world
        first = self.step * self.recipe.batch_size + self.ranks.rank * share
        images, labels = self.stream.batch(first, share, self.run.device)
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.bfloat16):
            z, log_det = self.flow(images, labels)
        loss = self.model.loss(z, log_det)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        self.optimizer.step()
        self.average_weights(z.detach())
        self.health += loss.detach() + norm
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def average_weights(self, z: Tensor) -> None:
        """Follow the weights, and the variance (T, D) of the latents where that is the model's prior."""
        if not self.config.nvp:
            self.model.prior.lerp_(self.ranks.mean(z.float().square().mean(0)), PRIOR_RATE)
        rate = 1 - self.recipe.decay(self.step)
        for average, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            average.lerp_(value, rate)

    def must_be_finite(self) -> None:
        if not torch.isfinite(self.health):
            raise InputError(
                f"the loss or its gradient is no longer finite at step {self.step}; what was saved before is intact. "
                "Try a lower `lr`, a longer `warmup` or a smaller `grad_clip`",
                field="lr",
            )

    @property
    def models(self) -> list[Path]:
        """The checkpoints: as the reference trainer names them, and the same as safetensors."""
        return [self.run.out / self.config.file_name(self.data.name, suffix) for suffix in (".pth", ".safetensors")]

    @property
    def class_names(self) -> list[Path]:
        """The file of what the classes are called, beside the checkpoints, where there are classes."""
        return [class_names.beside(self.models[0])] if self.data.classes else []

    def save(self) -> None:
        """Write the state to resume from and the checkpoints: all, or none where one cannot be written.

        All are written before the first takes its place. The state does so first: it holds what the others are made of.
        """
        self.must_be_finite()
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "identity": self.identity(),
        }
        with self.saving_models(), replacing_by_name(self.run.state) as partial, checkpoint.writer_errors():
            torch.save(state, partial)

    @contextlib.contextmanager
    def saving_models(self) -> Iterator[None]:
        """Write the checkpoints, which take their places when the block ends."""
        portable = copy.deepcopy(self.average).cpu()  # a .pth remembers its device, which another machine may lack
        with contextlib.ExitStack() as stack:
            for path in self.models:
                checkpoint.write(portable, stack.enter_context(replacing_by_name(path)), path.suffix)
            for path in self.class_names:
                names = stack.enter_context(replacing_by_name(path))
                names.write_bytes(class_names.lines(self.data.classes))
            yield

    def identity(self) -> dict[str, Any]:
        """What a resumed run has to have in common with the one that wrote the state."""
        return asdict(self.recipe) | self.config.to_dict() | {"data": self.data.fingerprint()}

    def restore(self) -> None:
        """Continue from the state in the output folder, and make the checkpoints its own: a run that was killed while
        it saved may have left those of an earlier step. Raises InputError naming what differs.
        """
        path, ours = self.run.state, self.identity()
        try:
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs = state["identity"]
        except Exception as error:  # a damaged file fails in many ways
            raise InputError(f"'{path}' is damaged ({str(error)[:120]}); `force` starts over", field="resume") from None
        names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        if names:
            listed = "\n  ".join(f"{name} was {theirs.get(name)}, now {ours.get(name)}" for name in names)
            raise InputError(f"'{path}' belongs to another run:\n  {listed}", field=names[0])
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.ranks.rank == 0:
            with self.saving_models():
                pass

    def sample(self) -> None:
        """Draw from the averaged weights, always from the same noise, into a PNG with a class in each column."""
        config, count, device = self.config, self.run.samples, self.run.device
        dice = generator(torch.device("cpu"), self.recipe.seed, "samples")
        noise = torch.randn(count, config.tokens, config.patch_dim, generator=dice).to(device)
        columns = min(config.classes, 16) or math.isqrt(count)
        labels = torch.arange(count, device=device) % columns if config.classes else None
        images = self.average.decode(noise, labels, self.run.guidance)
        if config.noise_std:
            images = self.average.denoise(images, labels)
        zoom = max(32 // config.image_size, 1)  # so that one can look at small images
        shown = images.cpu().numpy().repeat(zoom, 2).repeat(zoom, 3)
        sheet = grid(shown, columns, background=64)[1:-1, 1:-1]
        write_png(self.run.out / f"samples_{self.step:07d}.png", sheet, {})
