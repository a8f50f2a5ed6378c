"""Step, Forward, Gradient: one flow block as the three modules that get traced.

The same mathematics as ``tarflow.model``, written for a graph that must run anywhere: matrix products in two
dimensions on weights as they are stored, attention spelled out, precision made of explicit casts, no flip of a
weight. In patch order a reversed block is an anti-causal one, so Forward and Gradient never reorder anything.

Shapes: B images, T patches, W a window of them, D numbers in a patch, C width, H heads, d head dimension, S cache
slots, G guidance branches (1 or 2), R = G * B rows. Branches are weighed by ``mix`` (2, G, W): row 0 weighs their
log_scale, row 1 their shift; ``inverse_temperature`` (G,) multiplies their attention logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow.model import Attention, Block, Layer

MASKED = -1e30  # exp() of it is exactly 0, and unlike -inf it survives every backend's arithmetic


def product(h: Tensor, linear: nn.Linear) -> Tensor:
    """(rows, in) -> (rows, out), in the precision of the weights."""
    return F.linear(h.to(linear.weight.dtype), linear.weight, linear.bias)


def softmax(scores: Tensor) -> Tensor:
    """In float32, returned in the scores' own type."""
    return torch.softmax(scores.float(), -1)


class BlockGraph(nn.Module):
    """What the three graphs share. Weights keep the names they have in the block, prefixed ``block.``."""

    null_class: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.config = block.config
        if block.class_embed is not None:
            self.register_buffer("null_class", block.class_embed.detach().mean(0))  # (1, C)

    def embed(self, x: Tensor, positions: Tensor, labels: Tensor, branches: int) -> Tensor:
        """x (B, W, D), positions (W, C), labels (G, B) -> (G, B, W, C)."""
        batch, window, _ = x.shape
        h = product(x.reshape(batch * window, -1), self.block.proj_in).float()
        h = h.view(batch, window, -1) + positions
        h = h.unsqueeze(0).expand(branches, -1, -1, -1)
        if self.block.class_embed is None:
            return h
        known = self.block.class_embed.index_select(0, labels.clamp(min=0).reshape(-1))  # (R, 1, C)
        chosen = torch.where((labels < 0).reshape(-1, 1, 1), self.null_class, known)
        return h + chosen.view(branches, batch, 1, -1)

    def heads(self, attention: Attention, n: Tensor, rows: int, tempering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (R * W, C) -> query (scaled), key, value, each (R, H, W, d)."""
        qkv = product(n, attention.qkv).view(rows, -1, 3, attention.heads, attention.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query * tempering, key, value

    def tempering(self, inverse_temperature: Tensor, batch: int) -> Tensor:
        """(G,) -> (R, 1, 1, 1): what multiplies each row's queries."""
        scale = (inverse_temperature * self.config.head_dim**-0.5).to(self.block.proj_in.weight.dtype)
        rows: Tensor = scale.unsqueeze(1).expand(-1, batch).reshape(-1, 1, 1, 1)
        return rows

    def read_out(self, h: Tensor, mix: Tensor) -> tuple[Tensor | None, Tensor]:
        """(G, B, W, C) -> mixed log_scale (None when volume-preserving) and shift, (B, W, D) each."""
        branches, batch, window, _ = h.shape
        out = product(h.reshape(branches * batch * window, -1), self.block.proj_out).float()
        out = out.view(branches, batch, window, -1)
        weights = mix.unsqueeze(2).unsqueeze(-1)  # (2, G, 1, W, 1)
        if not self.config.nvp:
            return None, (out * weights[1]).sum(0)
        log_scale, shift = out.chunk(2, -1)
        return (log_scale * weights[0]).sum(0), (shift * weights[1]).sum(0)


class Step(BlockGraph):
    """A window of the inverse: patches known at ``position ... position + W - 1`` give the next ones.

    The cache is read only: slots at or past ``position`` are masked, and the window's own keys and values are
    returned for whoever owns the cache to store.
    """

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        labels: Tensor,
        position: Tensor,
        mix: Tensor,
        inverse_temperature: Tensor,
        cache: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x (B, W, D) at the window, z (B, W, D) one further, labels (G, B), position (1,), mix (2, G, W),
        inverse_temperature (G,), cache: per layer keys and values (R, H, S, d), in block order.

        Returns the patches one further, (B, W, D), and this window's keys and values (2 * layers, R, H, W, d).
        """
        batch, window, _ = x.shape
        branches = inverse_temperature.shape[0]
        rows = branches * batch
        offsets = torch.arange(window)
        index = position + offsets  # (W,), in block order
        if self.block.reversed:
            index = self.config.tokens - 1 - index
        h = self.embed(x, F.embedding(index, self.block.pos_embed), labels, branches)
        h = h.reshape(rows * window, -1)
        tempering = self.tempering(inverse_temperature, batch)
        slots = torch.arange(cache[0].shape[2])
        past_bias = torch.where(slots < position, 0.0, MASKED)  # (S,)
        window_bias = torch.where(offsets <= offsets.unsqueeze(1), 0.0, MASKED)  # (W, W)
        fresh = []
        for j, layer in enumerate(self.block.layers):
            attention, keys, values = layer.attention, cache[2 * j], cache[2 * j + 1]
            query, key, value = self.heads(attention, attention.norm(h), rows, tempering)
            past = (query @ keys.transpose(2, 3)).float() + past_bias
            own = (query @ key.transpose(2, 3)).float() + window_bias
            weights = softmax(torch.cat([past, own], -1)).to(query.dtype)
            past_weights, own_weights = torch.split(weights, [cache[0].shape[2], window], -1)
            mixed = past_weights @ values + own_weights @ value
            h = h + product(mixed.transpose(1, 2).reshape(rows * window, -1), attention.proj).float()
            h = h + product(F.gelu(product(layer.norm(h), layer.up).float()), layer.down).float()
            fresh += [key, value]
        log_scale, shift = self.read_out(h.view(branches, batch, window, -1), mix)
        x_next = z + shift if log_scale is None else z * log_scale.exp() + shift
        return x_next, torch.stack(fresh)


class Forward(BlockGraph):
    """Encode through one block, all positions at once; with ``mix``, the exact inverse of guided decoding."""

    def forward(self, x: Tensor, labels: Tensor, mix: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), labels (G, B), mix (2, G, T), inverse_temperature (G,) -> z (B, T, D), log_det (B,) in nats.

        x and z are in patch order, ``mix`` in block order, as in Step.
        """
        batch, tokens, _ = x.shape
        branches = inverse_temperature.shape[0]
        rows = branches * batch
        h = self.embed(x, self.block.pos_embed, labels, branches).reshape(rows * tokens, -1)
        tempering = self.tempering(inverse_temperature, batch)
        mask = self.causal(tokens)
        for layer in self.block.layers:
            attention = layer.attention
            query, key, value = self.heads(attention, attention.norm(h), rows, tempering)
            weights = softmax((query @ key.transpose(2, 3)).float().masked_fill(mask, MASKED)).to(query.dtype)
            mixed = (weights @ value).transpose(1, 2).reshape(rows * tokens, -1)
            h = h + product(mixed, attention.proj).float()
            h = h + product(F.gelu(product(layer.norm(h), layer.up).float()), layer.down).float()
        mix = mix.flip(2) if self.block.reversed else mix
        log_scale, shift = self.read_out(h.view(branches, batch, tokens, -1), mix)
        shift = self.shifted(shift)
        if log_scale is None:
            return x - shift, torch.zeros_like(x[:, 0, 0])
        log_scale = self.shifted(log_scale)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum((1, 2))

    def causal(self, tokens: int) -> Tensor:
        """(T, T), True where attention may not look."""
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        return ones.tril(-1) if self.block.reversed else ones.triu(1)

    def shifted(self, parameters: Tensor) -> Tensor:
        """From the patch that computes them to the patch they belong to, the next in block order."""
        nothing = torch.zeros_like(parameters[:, :1])
        if self.block.reversed:
            return torch.cat([parameters[:, 1:], nothing], 1)
        return torch.cat([nothing, parameters[:, :-1]], 1)


class Gradient(Forward):
    """The vector-Jacobian product of :class:`Forward` (one branch), written out because autograd does not trace."""

    def forward(  # type: ignore[override]  # another graph of the same block, not a refinement of Forward
        self, x: Tensor, labels: Tensor, grad_z: Tensor, grad_log_det: Tensor
    ) -> Tensor:
        """x (B, T, D), labels (1, B), grad_z (B, T, D), grad_log_det (B,) -> grad_x (B, T, D)."""
        batch, tokens, _ = x.shape
        mask = self.causal(tokens)
        h = self.embed(x, self.block.pos_embed, labels, 1).reshape(batch * tokens, -1)
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
        tempering = torch.full((1,), attention.head_dim**-0.5, dtype=attention.qkv.weight.dtype)
        query, key, value = self.heads(attention, affine(standard_in, attention.norm), batch, tempering)
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
