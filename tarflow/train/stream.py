"""The endless stream of noisy batches that training sees.

Everything random is a pure function of the seed and of a position in the stream, so that a run can be stopped,
resumed, or spread over more processes without changing a single draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .data import Split


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A fresh generator that depends on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def noisy(images: Tensor, noise_std: float | None, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
    """uint8 images (B, ...) -> [-1, 1] with the model's training noise; image i's noise depends on ``keys[i]`` alone.

    Gaussian noise of ``noise_std``, or for None uniform dequantisation (arXiv 2412.06329, on noise augmented training).
    """
    draw = torch.rand if noise_std is None else torch.randn
    shape, device = images.shape[1:], images.device
    noise = torch.stack([draw(shape, generator=generator(device, *key), device=device) for key in keys])
    if noise_std is None:
        return (images.float() + noise) * (2 / 256) - 1
    return images.float() / 127.5 - 1 + noise_std * noise


def shift(images: Tensor, by: Tensor) -> Tensor:
    """Move uint8 images (B, channels, size, size) right and down by (B, 2) pixels, or fractions: bicubic."""
    moves = torch.eye(2, 3).repeat(len(images), 1, 1)
    moves[:, :, 2] = -by * (2 / images.shape[-1])  # grids span two units
    grid = functional.affine_grid(moves, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, "bicubic", padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


@dataclass(slots=True)
class Stream:
    """The endless sequence of training examples: epoch after epoch, each in an order of its own."""

    split: Split
    noise_std: float | None
    seed: int
    drop_label: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    _epoch: int = -1
    _shuffle: NDArray[np.int64] | None = None

    def order(self, start: int, count: int) -> NDArray[np.int64]:
        """Which images stand at positions ``start`` to ``start + count`` of the stream."""
        epochs, offsets = np.divmod(np.arange(start, start + count), len(self.split))
        return np.concatenate([self._shuffled(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        if self._shuffle is None or epoch != self._epoch:
            dice = generator(torch.device("cpu"), self.seed, "order", epoch)
            self._shuffle, self._epoch = torch.randperm(len(self.split), generator=dice).numpy(), epoch
        return self._shuffle

    def batch(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Examples ``start`` to ``start + count``: images (count, channels, size, size) in [-1, 1], labels (count,).

        A dropped label is -1, the null class.
        """
        part = self.split.take(self.order(start, count))
        keys = [(self.seed, "example", position) for position in range(start, start + count)]
        coins = torch.stack([torch.rand(4, generator=generator(torch.device("cpu"), *key, "coins")) for key in keys])
        images = torch.from_numpy(part.images)
        if self.flip:
            images = torch.where((coins[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.jitter:
            images = shift(images, (2 * coins[:, 2:] - 1) * self.jitter)
        images = noisy(images.to(device), self.noise_std, keys)
        if part.labels is None:
            return images, None
        labels = torch.from_numpy(part.labels)
        return images, torch.where(coins[:, 1] < self.drop_label, -1, labels).to(device)
