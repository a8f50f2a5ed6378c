"""The PyTorch twin of a runtime backend: the same methods on the same arrays, computed by the model itself.

The oracle for parity. Gradients come from autograd, attention from PyTorch's own kernel, so that it shares no code
with the graphs it judges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .model import Block, Branch, TarFlow

if TYPE_CHECKING:
    from .runtime.backend import Array, Branches, Labels, Mask


class Twin:
    """A backend that runs the model itself in PyTorch, float32, on the model's device."""

    description = f"PyTorch {torch.__version__}"
    machine = "PyTorch"  # for which nothing is calibrated
    precision = "fp32"
    largest_batch: int | None = None
    window = 16
    portable = False

    def __init__(self, model: TarFlow) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def lanes(self) -> None:
        """None: PyTorch's threads are the process's."""

    def decoding(self, block: int, z: Array, branches: Branches) -> TwinDecoding:
        return TwinDecoding(self.model.blocks[block], self.tensor(z), branches)

    @torch.no_grad()
    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        if len(branches.labels) > 1:
            return self._guided_forward(self.model.blocks[block], self.tensor(x), branches)
        z, log_det = self.model.blocks[block].encode(self.tensor(x), self.tensor(branches.labels[0]))
        return z.cpu().numpy(), log_det.cpu().numpy()

    def gradient(self, block: int, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Array:
        inputs = self.tensor(x).requires_grad_(True)
        with torch.enable_grad():
            z, log_det = self.model.blocks[block].encode(inputs, self.tensor(labels))
            total = (z * self.tensor(grad_z)).sum() + (log_det * self.tensor(grad_log_det)).sum()
            (grad,) = torch.autograd.grad(total, inputs)
        result: Array = grad.cpu().numpy()
        return result

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _guided_forward(self, block: Block, x: Tensor, branches: Branches) -> tuple[Array, Array]:
        """The inverse of guided decoding: walk the steps, solving each for z instead of x."""
        x = block.order(x)
        passes = _passes(block, x, branches)
        mix = torch.from_numpy(branches.mix).to(x)
        z, log_det = [x[:, :1]], torch.zeros(len(x), device=x.device)
        for i in range(x.shape[1] - 1):
            log_scale, shift = block.step(x[:, i : i + 1], i, passes, mix[:, :, i])
            z.append((x[:, i + 1 : i + 2] - shift) * torch.exp(-log_scale))
            log_det = log_det - log_scale.sum((1, 2))
        return block.order(torch.cat(z, 1)).cpu().numpy(), log_det.cpu().numpy()


class TwinDecoding:
    """One block being inverted in PyTorch."""

    def __init__(self, block: Block, z: Tensor, branches: Branches) -> None:
        self.block, self.z = block, block.order(z)
        self.x: Array = self.z.cpu().numpy().copy()
        self.mix = torch.from_numpy(branches.mix).to(z)
        self.passes = _passes(block, z, branches)

    def guess(self, patches: Array) -> None:
        self.x[:] = self._ordered(patches)

    def step(self, position: int, window: int = 1) -> None:
        self.x[:, position + 1 : position + 1 + window] = self.evaluate(position, window)

    @torch.no_grad()
    def evaluate(self, position: int, window: int, rows: Mask | None = None, steady: bool = False) -> Array:
        found = []
        for i in range(position, position + window):
            known = torch.from_numpy(self.x[:, i : i + 1]).to(self.z)
            log_scale, shift = self.block.step(known, i, self.passes, self.mix[:, :, i])
            found.append(self.z[:, i + 1 : i + 2] * log_scale.exp() + shift)
        result: Array = torch.cat(found, 1).cpu().numpy()
        return result

    def patches(self) -> Array:
        return np.ascontiguousarray(self._ordered(self.x))

    def _ordered(self, patches: Array) -> Array:
        return patches[:, ::-1] if self.block.reversed else patches

    def close(self) -> None:
        """Nothing to let go of."""


def _passes(block: Block, like: Tensor, branches: Branches) -> list[Branch]:
    labels = torch.from_numpy(np.ascontiguousarray(branches.labels)).to(like.device)
    return block.branches(like, labels, (1.0 / float(inverse) for inverse in branches.inverse_temperature))
