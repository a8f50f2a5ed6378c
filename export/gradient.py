"""Gradient: the fourth graph of a block, backwards through :class:`~.graphs.Forward` by hand.

Shapes: B images, T patches, D numbers in a patch, C width, H heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow.model import Layer

from ..runtime.ports import MASKED
from .graphs import Forward, product, softmax


class Gradient(Forward):
    """The vector-Jacobian product of :class:`Forward` (one branch), written out because autograd does not trace."""

    def forward(  # type: ignore[override]  # another graph of the same block, not a refinement of Forward
        self, x: Tensor, labels: Tensor, grad_z: Tensor, grad_log_det: Tensor
    ) -> Tensor:
        """x (B, T, D), labels (1, B), grad_z (B, T, D), grad_log_det (B,) -> grad_x (B, T, D)."""
        batch, tokens, _ = x.shape
        mask = self.causal(tokens)
        h = self.embed(x, labels, self.block.pos_embed)
        tapes = []
        for layer in self.block.layers:
            h, tape = self.layer_forward(layer, h, batch, mask)
            tapes.append(tape)
        out = product(h, self.block.proj_out).float().view(batch, tokens, -1)

        if self.config.nvp:
            log_scale, shift = (self.shifted(part) for part in out.chunk(2, -1))
            scale = torch.exp(-log_scale)
            grad_x = grad_z * scale
            grad_log_scale = -grad_z * (x - shift) * scale - grad_log_det.view(-1, 1, 1)
            grad_out = torch.cat([self.unshifted(grad_log_scale), self.unshifted(-grad_x)], -1)
        else:
            grad_x = grad_z
            grad_out = self.unshifted(-grad_z)

        grad_h = product_vjp(grad_out.reshape(batch * tokens, -1), self.block.proj_out)
        for layer, tape in zip(reversed(self.block.layers), reversed(tapes), strict=True):
            grad_h = self.layer_vjp(layer, grad_h, tape, batch)
        return grad_x + product_vjp(grad_h, self.block.proj_in).view(batch, tokens, -1)

    def layer_forward(self, layer: Layer, h: Tensor, batch: int, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B * T, C) -> (B * T, C), and what its gradient needs."""
        attention = layer.attention
        standard_in, spread_in = standardise(h, attention.norm)
        query, key, value = self.heads(attention, affine(standard_in, attention.norm), batch)
        query = query * attention.head_dim**-0.5
        weights = softmax((query @ key.transpose(2, 3)).float().masked_fill(mask, MASKED))
        mixed = (weights.to(value.dtype) @ value).transpose(1, 2).reshape(h.shape)
        h = h + product(mixed, attention.proj).float()
        standard_mid, spread_mid = standardise(h, layer.norm)
        up = product(affine(standard_mid, layer.norm), layer.up).float()
        h = h + product(F.gelu(up), layer.down).float()
        return h, (standard_in, spread_in, query, key, value, weights, standard_mid, spread_mid, up)

    def layer_vjp(self, layer: Layer, grad_h: Tensor, tape: tuple[Tensor, ...], batch: int) -> Tensor:
        """Gradient after the layer -> gradient before it, (B * T, C)."""
        attention = layer.attention
        standard_in, spread_in, query, key, value, weights, standard_mid, spread_mid, up = tape

        grad_up = product_vjp(grad_h, layer.down) * gelu_slope(up)
        grad_h = grad_h + norm_vjp(product_vjp(grad_up, layer.up), standard_mid, spread_mid, layer.norm)

        grad_mixed = product_vjp(grad_h, attention.proj).view(batch, -1, attention.heads, attention.head_dim)
        grad_mixed = grad_mixed.transpose(1, 2).to(value.dtype)  # (B, H, T, d)
        grad_value = weights.to(value.dtype).transpose(2, 3) @ grad_mixed
        grad_weights = (grad_mixed @ value.transpose(2, 3)).float()
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        grad_scores = grad_scores.to(value.dtype)
        grad_query = (grad_scores @ key) * attention.head_dim**-0.5
        grad_key = grad_scores.transpose(2, 3) @ query  # the query already carries the scale
        grad_qkv = torch.stack([grad_query, grad_key, grad_value], 2)  # (B, H, 3, T, d)
        grad_qkv = grad_qkv.permute(0, 3, 2, 1, 4).reshape(grad_h.shape[0], -1)
        return grad_h + norm_vjp(product_vjp(grad_qkv, attention.qkv), standard_in, spread_in, attention.norm)

    def unshifted(self, grad: Tensor) -> Tensor:
        """The transpose of :meth:`Forward.shifted`."""
        nothing = torch.zeros_like(grad[:, :1])
        if self.block.reversed:
            return torch.cat([nothing, grad[:, :-1]], 1)
        return torch.cat([grad[:, 1:], nothing], 1)


def product_vjp(grad: Tensor, linear: nn.Linear) -> Tensor:
    return (grad.to(linear.weight.dtype) @ linear.weight).float()


def standardise(h: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the reciprocal of their spread."""
    centred = h - h.mean(-1, keepdim=True)
    spread = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + norm.eps)
    return centred * spread, spread


def affine(standard: Tensor, norm: nn.LayerNorm) -> Tensor:
    return standard * norm.weight + norm.bias


def norm_vjp(grad: Tensor, standard: Tensor, spread: Tensor, norm: nn.LayerNorm) -> Tensor:
    grad = grad * norm.weight
    along = (grad * standard).mean(-1, keepdim=True)
    return spread * (grad - grad.mean(-1, keepdim=True) - standard * along)


def gelu_slope(u: Tensor) -> Tensor:
    """d/du of u * Phi(u)."""
    cumulative = 0.5 * (1 + torch.erf(u * 2**-0.5))
    slope: Tensor = cumulative + u * torch.exp(-0.5 * u * u) * (2 * torch.pi) ** -0.5
    return slope
