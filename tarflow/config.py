"""The numbers of a TarFlow model, and how they are read off a checkpoint's shapes and file name."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .runtime.errors import InputError
from .runtime.manifest import LARGEST_NOISE, ModelShape

_log = logging.getLogger(__name__)
PICTURE_CHANNELS = (1, 3, 4)  # that a file's name is believed to mean
SAID, CARRIED = "what was said at export", "the checkpoint itself"  # where a training noise was read
HEAD_DIM = 64  # every published model; shapes cannot tell it
_FILE_NAME = re.compile(
    r"^(?P<dataset>.+)_model_(?P<patch>\d+)_(?P<width>\d+)_(?P<blocks>\d+)_(?P<layers>\d+)"
    r"_(?P<noise>\d++(?:\.\d++)?+|uniform)(?: \(\d+\))?(?:\.[a-zA-Z]\w*)*$"  # a copy's number, any suffix
)


class ConfigError(InputError):
    """Numbers that make no model, or a checkpoint whose numbers cannot all be inferred."""


@dataclass(frozen=True, slots=True)
class Config(ModelShape):
    """The shape of a TarFlow model (arXiv 2412.06329), checked. Raises :class:`ConfigError`.

    ``noise_std`` is the Gaussian training noise in [-1, 1] image units, or None for a model trained with
    uniform dequantisation. ``classes`` is 0 for an unconditional model. ``nvp=False`` is the
    volume-preserving variant with a learned prior variance.
    """

    classes: int = 0
    nvp: bool = True
    noise_std: float | None = None
    head_dim: int = HEAD_DIM

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch_size", "width", "blocks", "layers", "head_dim"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) < 2**63:
                raise ConfigError.of(name, getattr(self, name), "a positive number")
        if type(self.classes) is not int or not 0 <= self.classes < 2**63:
            raise ConfigError.of("classes", self.classes, "0 (unconditional) or more")
        if type(self.nvp) is not bool:
            raise ConfigError.of("nvp", self.nvp, "true or false")
        if self.image_size % self.patch_size:
            raise ConfigError.of("patch_size", self.patch_size, f"a divisor of the image size, {self.image_size}")
        if self.width % self.head_dim:
            raise ConfigError.of("width", self.width, f"a multiple of the head dimension, {self.head_dim}")
        noise = self.noise_std
        if noise is not None and not (type(noise) in (int, float) and 0 <= noise <= LARGEST_NOISE):
            raise ConfigError.of("noise_std", noise, f"a number from 0 to {LARGEST_NOISE:g}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def file_name(self, dataset: str, suffix: str = ".pth") -> str:
        """The name the reference trainer would give this model's checkpoint."""
        noise = "uniform" if self.noise_std is None else f"{self.noise_std:.2f}"
        return f"{dataset}_model_{self.patch_size}_{self.width}_{self.blocks}_{self.layers}_{noise}{suffix}"


@dataclass(frozen=True, slots=True)
class Hints:
    """What shapes cannot tell. ``noise_std`` is a standard deviation or "uniform"; None means not said.

    ``weights`` are those to take from a file that has several: "ema", "raw", or the key that they are under.
    ``class_names`` is a file with what the classes are called, one a line.
    """

    patch_size: int | None = None
    noise_std: float | str | None = None
    weights: str | None = None
    class_names: str | os.PathLike[str] | None = None


def infer(shapes: Mapping[str, tuple[int, ...]], file_name: str, hints: Hints) -> tuple[Config, str]:
    """Read a model's numbers off the shapes of its (reference-named) state dict and its file name; and where the noise
    was read, in words.

    What is said in ``hints`` wins over the file name. A patch size of the name's is taken where it gives pictures, of
    1, 3 or 4 channels; one of the hints where it fits. Raises :class:`ConfigError` that names exactly the hints still
    needed. The names in ``shapes`` must be complete: see ``checkpoint``.
    """
    tokens, width = shapes["blocks.0.pos_embed"]
    patch_dim = shapes["blocks.0.proj_in.weight"][1]
    blocks = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    layers = 1 + max(int(name.split(".")[3]) for name in shapes if name.startswith("blocks.0.attn_blocks."))
    classes = shapes["blocks.0.class_embed"][0] if "blocks.0.class_embed" in shapes else 0
    nvp = shapes["blocks.0.proj_out.weight"][0] == 2 * patch_dim

    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ConfigError(f"the position embedding has {tokens} tokens; expected a square number of patches")

    named, wrong = _read_name(file_name, (width, blocks, layers), patch_dim)
    patch_size = hints.patch_size if hints.patch_size is not None else named.get("patch")
    noise = hints.noise_std if hints.noise_std is not None else named.get("noise")
    missing = {}
    if patch_size is None:
        missing["patch_size"] = _patch_choices(patch_dim)
    if noise is None:
        missing["noise_std"] = "the training noise, or 'uniform' for uniform dequantisation"
    if missing:
        found = wrong or "does not say everything about its model"
        likely = f"imagenet_model_{_likely_side(patch_dim)}_{width}_{blocks}_{layers}_0.05.pth"
        raise ConfigError(
            f"'{file_name}' {found}; expected a name like {likely}. Pass\n  "
            + "\n  ".join(f"`{field}`: {meaning}" for field, meaning in missing.items()),
            field=next(iter(missing)),
        )
    assert patch_size is not None
    assert noise is not None
    if wrong:
        _log.warning("'%s' %s: what was said is taken", file_name, wrong)
    size = int(patch_size)
    channels = patch_dim // max(size**2, 1)
    if size < 1 or channels < 1 or channels * size**2 != patch_dim:
        advice = f"these weights have patches of {patch_dim} numbers"
        raise ConfigError.of("patch_size", size, _patch_choices(patch_dim), advice)
    config = Config(grid * size, channels, size, width, blocks, layers, classes, nvp, parse_noise(noise))
    return config, SAID if hints.noise_std is not None else _noise_of_name(str(noise))


def _read_name(file_name: str, shape: tuple[int, int, int], patch_dim: int) -> tuple[dict[str, str], str]:
    """The "patch" and "noise" that a name says, without what the shapes contradict; and what that is, in words."""
    match = _FILE_NAME.match(file_name)
    if match is None:
        return {}, ""
    said = tuple(int(match[name]) for name in ("width", "blocks", "layers"))
    if said != shape:  # it speaks of another model: none of it can be trusted
        told = "is the name of a model of width {}, {} blocks and {} layers".format(*said)
        return {}, f"{told}, and the weights are of one of {', '.join(map(str, shape))}"
    size = int(match["patch"])
    if size and patch_dim % size**2 == 0 and patch_dim // size**2 in PICTURE_CHANNELS:
        return {"patch": match["patch"], "noise": match["noise"]}, ""
    found = f"{patch_dim // size**2} channels" if size and patch_dim % size**2 == 0 else "no whole number of channels"
    told = f"names patches of {size}, and the weights, whose patches have {patch_dim} numbers, would have {found} then"
    return {"noise": match["noise"]}, told


def _noise_of_name(noise: str) -> str:
    decimals = len(noise.partition(".")[2])
    count = {0: "no decimals", 1: "one decimal", 2: "two decimals"}.get(decimals, f"{decimals} decimals")
    return "the checkpoint's name" + (f", which has {count}" if noise != "uniform" else "")


def parse_noise(noise: float | str) -> float | None:
    """'uniform' -> None, anything else -> a standard deviation."""
    if noise == "uniform":
        return None
    try:
        return float(noise)
    except ValueError:
        raise ConfigError.of("noise_std", f"'{noise}'", "a number, or 'uniform'") from None


def _likely_side(patch_dim: int) -> int:
    """The side of a patch that makes pictures of patches of so many numbers; the reference's, 2, where none does."""
    sides = {patch_dim / (p * p): p for p in range(1, math.isqrt(patch_dim) + 1)}
    return next((sides[channels] for channels in (3, 1, 4) if channels in sides), 2)


def _patch_choices(patch_dim: int) -> str:
    choices = [p for p in range(1, math.isqrt(patch_dim) + 1) if patch_dim % (p * p) == 0]
    return "one of " + ", ".join(f"{p} ({patch_dim // (p * p)} channels)" for p in choices)
