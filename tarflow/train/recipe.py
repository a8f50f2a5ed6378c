"""What to train and how: the numbers that decide the weights, and those that only decide what is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..runtime.errors import InputError

LOWEST_RATE = 1e-6  # where the cosine ends
_LIMITS = {  # field -> lowest and highest value
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "lr": (LOWEST_RATE, 1.0),
    "warmup": (0, math.inf),
    "weight_decay": (0, 1.0),
    "drop_label": (0, 1.0),
    "ema": (0, 0.999999),
    "grad_clip": (0, math.inf),
    "jitter": (0, math.inf),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, besides the model's shape and the data. Raises InputError.

    ``batch_size`` counts the images of one step over all processes. ``ema`` is the decay of the averaged weights,
    which are what is saved and sampled from. ``drop_label`` is the share of labels replaced by the null class,
    without which guidance has nothing to contrast. ``grad_clip`` limits the gradient's norm; 0 does not. ``flip``
    mirrors half of the images, ``jitter`` moves each by up to that many pixels, or that fraction of one.
    """

    steps: int
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 1e-4
    drop_label: float = 0.1
    ema: float = 0.999
    grad_clip: float = 1.0
    flip: bool = False
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _LIMITS.items():
            if not lowest <= getattr(self, name) <= highest:
                bound = "" if highest == math.inf else f" and at most {highest:g}"
                raise InputError.of(name, getattr(self, name), f"at least {lowest:g}{bound}")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to ``lr``, then a cosine that ends at 1e-6 after the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return LOWEST_RATE + 0.5 * (1 + math.cos(math.pi * progress)) * (self.lr - LOWEST_RATE)

    def decay(self, step: int) -> float:
        """Decay of the averaged weights; smaller at first, so that the random start is soon forgotten."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True, slots=True)
class Run:
    """Where a recipe is carried out, on what, and what it writes. Raises InputError.

    The ``every`` numbers are in steps; ``sample_every`` 0 draws no samples. ``amp`` is "auto", "on" or "off"
    (bfloat16 matrix products). ``resume`` continues the run in ``out``, ``force`` replaces it.
    """

    out: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: str = "auto"
    resume: bool = False
    force: bool = False
    log_every: int = 50
    evaluate_every: int = 250
    sample_every: int = 500
    save_every: int = 500
    samples: int = 100
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.amp not in ("auto", "on", "off"):
            raise InputError.of("amp", f"'{self.amp}'", "auto, on or off")
        for name in ("log_every", "evaluate_every", "save_every", "samples"):
            if getattr(self, name) < 1:
                raise InputError.of(name, getattr(self, name), "1 or more")
        if self.sample_every < 0:
            raise InputError.of("sample_every", self.sample_every, "1 or more, or 0 for no samples")
        if self.resume and self.force:
            raise InputError("`resume` continues a run and `force` starts it over; choose one", field="force")

    @property
    def state(self) -> Path:
        """The file a run is resumed from."""
        return self.out / "state.pt"

    @property
    def log(self) -> Path:
        """One JSON document a line."""
        return self.out / "log.jsonl"

    def prepare(self, writes: bool) -> None:
        """Make the folder ready, by the process that ``writes``. Raises InputError rather than lose a run."""
        if self.resume and not self.state.exists():
            raise InputError(
                f"'{self.out}' has no state.pt to resume from; leave out `resume` to start a run there", field="resume"
            )
        if self.state.exists() and not (self.resume or self.force):
            raise InputError(
                f"'{self.out}' already holds a run; `resume` continues it, `force` starts it over", field="out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"'{self.out}' is a file; expected a folder to write to", field="out")
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                for leftover in (self.state, self.log, *self.out.glob("samples_*.png")):
                    leftover.unlink(missing_ok=True)

    def use_bfloat16(self, uniform: bool) -> bool:
        """Whether matrix products run in bfloat16. Never in float16: its range would need loss scaling.

        "auto" does on CUDA, but not for uniform dequantisation: those likelihoods are compared at the second decimal.
        "on" does on CPUs too, of which some have instructions for it and the others compute it slowly.
        """
        able = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        if self.amp == "on" and not able and self.device.type != "cpu":
            advice = f"{self.device} has no bfloat16"
            raise InputError.of("amp", "'on'", "off, or a device that has bfloat16", advice)
        return self.amp == "on" or (self.amp == "auto" and able and not uniform)
