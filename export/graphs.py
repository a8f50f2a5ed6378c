"""Step, Resident, Forward (and Gradient, beside): one flow block as the modules that get traced.

The same mathematics as ``tarflow.model``, written for a graph that must run anywhere and fast: matrix products in two
dimensions on weights as they are stored, attention spelled out, precision made of explicit casts, no flip of a weight,
and in Step, which runs once for every patch, nothing that a host can prepare once for many steps. In patch order a
reversed block is an anti-causal one, so Forward and Gradient never reorder anything.

Shapes: B images, T patches, W a window of them, N = B * W, D numbers in a patch, C width, H heads, d head dimension,
S cache slots, G guidance branches (1 or 2), R = G * B rows. ``labels`` are classes, or ``classes`` for the null class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow.model import Attention, Block, Layer

from ..runtime.ports import MASKED


def product(h: Tensor, linear: nn.Linear) -> Tensor:
    """(rows, in) -> (rows, out), in the precision of the weights."""
    return F.linear(h.to(linear.weight.dtype), linear.weight, linear.bias)


def softmax(scores: Tensor) -> Tensor:
    """In float32, returned in the scores' own type."""
    return torch.softmax(scores.float(), -1)


class BlockGraph(nn.Module):
    """What the graphs share. Weights keep the names they have in the block, prefixed ``block.``."""

    class_table: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.config = block.config
        if block.class_embed is not None:  # (classes + 1, C): the null class, their mean, comes last
            table = block.class_embed.detach()[:, 0]
            self.register_buffer("class_table", torch.cat([table, table.mean(0, keepdim=True)]))

    def heads(self, attention: Attention, n: Tensor, rows: int) -> list[Tensor]:
        """Normalised (R * W, C) -> query, key, value, each (R, H, W, d)."""
        together = product(n, attention.qkv).view(rows, -1, 3 * attention.heads, attention.head_dim)
        return list(together.transpose(1, 2).chunk(3, 1))  # one operator each for the three of them

    def finish(self, layer: Layer, h: Tensor, mixed: Tensor) -> Tensor:
        """h (R * W, C) at a layer's begin, and the values its attention mixed (R, H, W, d) -> h after the layer."""
        together = mixed.transpose(1, 2).reshape(-1, self.config.width)
        h = h + product(together, layer.attention.proj).float()
        return h + product(F.gelu(product(layer.norm(h), layer.up).float()), layer.down).float()

    def embed(self, x: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """x (B, W, D), labels (G, B), the patches' rows of the position embedding (W, C) -> (R * W, C)."""
        batch, window, _ = x.shape
        h = product(x.reshape(-1, self.config.patch_dim), self.block.proj_in).float()
        h = h.view(batch, window, -1) + places
        if self.block.class_embed is None:
            h = h.unsqueeze(0).expand(labels.shape[0], -1, -1, -1)
        else:
            h = h + F.embedding(labels, self.class_table).unsqueeze(2)
        return h.reshape(-1, self.config.width)

    def query_scale(self, inverse_temperature: Tensor, batch: int) -> Tensor:
        """(G,) -> (R, 1, 1, 1), in the precision of the weights."""
        scale: Tensor = (inverse_temperature * self.config.head_dim**-0.5).to(self.block.proj_in.weight.dtype)
        return scale.unsqueeze(1).expand(-1, batch).reshape(-1, 1, 1, 1)


class Step(BlockGraph):
    """A window of the inverse: patches known at positions p ... p + W - 1 give the next ones, for B images at once.

    The cache is read only: ``bias`` masks its slots from p on, and the window's own keys and values are returned for
    whoever owns the cache to store. Patches, indices and labels come image by image, so that W = 1 costs no reshape.
    """

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        index: Tensor,
        labels: Tensor,
        mix: Tensor,
        query_scale: Tensor,
        bias: Tensor,
        cache: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x (N, D) in the window, z (N, D) one position further, index (N) of the window's patches in patch order,
        labels (G, N), mix (G, N, 2 D) (D if volume-preserving) to weigh each branch's log_scale and shift by,
        query_scale (R, 1, 1, 1), bias (W, S + W) added to attention scores, cache: per layer keys and values,
        (R, H, S, d) each, slots in block order.

        Returns the patches one further, (N, D), and this window's keys and values (2 * layers * R, H, W, d).
        """
        rows, slots = cache[0].shape[0], cache[0].shape[2]
        h = product(x, self.block.proj_in).float() + F.embedding(index, self.block.pos_embed)  # (N, C)
        if self.block.class_embed is None:
            h = h.unsqueeze(0).expand(labels.shape[0], -1, -1)
        else:
            h = h + F.embedding(labels, self.class_table)  # (G, N, C)
        h = h.reshape(-1, self.config.width)  # (R * W, C)
        query_scale = query_scale.to(self.block.proj_in.weight.dtype)
        fresh = []
        for j, layer in enumerate(self.block.layers):
            attention, keys, values = layer.attention, cache[2 * j], cache[2 * j + 1]
            query, key, value = self.heads(attention, attention.norm(h), rows)
            query = query * query_scale
            scores = torch.cat([query @ keys.transpose(2, 3), query @ key.transpose(2, 3)], -1).float() + bias
            past, own = torch.split(softmax(scores).to(query.dtype), [slots, bias.shape[0]], -1)
            h = self.finish(layer, h, past @ values + own @ value)
            fresh += [key, value]
        out = product(h, self.block.proj_out).float().view(mix.shape) * mix
        out = out.sum(0)  # (N, 2 D)
        if self.config.nvp:
            log_scale, shift = out.chunk(2, -1)
            return z * log_scale.exp() + shift, torch.cat(fresh)
        return z + out, torch.cat(fresh)


class Resident(BlockGraph):
    """The step for a device: sequence, cache and position are state that stays there, each written in place.

    Bind every state output to the memory of its input and the same launch, or one captured CUDA graph, makes every
    step. Nothing else changes between steps. Positions are not checked here: writes out of range are dropped.
    """

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        z: Tensor,
        offsets: Tensor,
        labels: Tensor,
        mix: Tensor,
        inverse_temperature: Tensor,
        cache: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """x (B, 1, T, D) known up to ``position`` (1,), z (B, T, D), both in block order, offsets (W,) = 0 ... W - 1,
        labels (G, B), mix (2, G, T), inverse_temperature (G,), cache: per layer keys and values, (R, H, T, d) each.

        Returns the state after the step: x with the W patches from ``position`` + 1 on, ``position`` + W, the cache
        with the window's keys and values.
        """
        batch, tokens = x.shape[0], self.config.tokens
        at = position + offsets  # (W,)
        place = tokens - 1 - at if self.block.reversed else at
        h = self.embed(x.index_select(2, at).squeeze(1), labels, F.embedding(place, self.block.pos_embed))
        scale = self.query_scale(inverse_temperature, batch)
        hidden = torch.arange(tokens) > at.unsqueeze(1)  # (W, T)
        written = []
        for j, layer in enumerate(self.block.layers):
            attention = layer.attention
            query, key, value = self.heads(attention, attention.norm(h), cache[2 * j].shape[0])
            keys = self.write(cache[2 * j], key, position)
            values = self.write(cache[2 * j + 1], value, position)
            scores = (query * scale) @ keys.transpose(2, 3)  # (R, H, W, T)
            weights = softmax(scores.float().masked_fill(hidden, MASKED)).to(query.dtype)
            h = self.finish(layer, h, weights @ values)
            written += [keys, values]
        outputs = self.config.patch_dim * (2 if self.config.nvp else 1)  # said, not inferred: parsers need to know it
        out = product(h, self.block.proj_out).float().view(labels.shape[0], batch, at.shape[0], outputs)
        mix = mix.index_select(2, at).unsqueeze(2).unsqueeze(-1)  # (2, G, 1, W, 1)
        found = z.index_select(1, at + 1)
        if self.config.nvp:
            log_scale, shift = out.chunk(2, -1)
            found = found * (log_scale * mix[0]).sum(0).exp() + (shift * mix[1]).sum(0)
        else:
            found = found + (out * mix[1]).sum(0)
        return self.write(x, found.unsqueeze(1), position + 1), at[-1:] + 1, *written

    def write(self, slots: Tensor, fresh: Tensor, position: Tensor) -> Tensor:
        """slots (N, H, T, d) with those from ``position`` on replaced by fresh (N, H, W, d)."""
        written: Tensor = torch.ops.tarflow.write_slots(slots, fresh, position.expand(slots.shape[0]))
        return written


@torch.library.custom_op("tarflow::write_slots", mutates_args=())
def write_slots(slots: Tensor, fresh: Tensor, positions: Tensor) -> Tensor:
    """A copy of slots (N, H, T, d) with fresh (N, H, W, d) from ``positions`` (N,) on, which are all the same.

    One operator, which becomes ONNX's TensorScatter.
    """
    offset = torch.arange(slots.shape[2]) - positions[:1]
    inside = (offset >= 0) & (offset < fresh.shape[2])
    return torch.where(inside.unsqueeze(1), fresh.index_select(2, offset.clamp(0, fresh.shape[2] - 1)), slots)


@write_slots.register_fake
def _(slots: Tensor, fresh: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(slots)


class Forward(BlockGraph):
    """Encode through one block, all positions at once; with ``mix``, the exact inverse of guided decoding."""

    def forward(self, x: Tensor, labels: Tensor, mix: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), labels (G, B), mix (2, G, T), inverse_temperature (G,) -> z (B, T, D), log_det (B,) in nats.

        x and z are in patch order, ``mix`` in block order: it weighs the branches' log_scale (row 0) and shift (row 1).
        """
        batch, tokens, _ = x.shape
        branches = labels.shape[0]
        h = self.embed(x, labels, self.block.pos_embed)
        scale = self.query_scale(inverse_temperature, batch)
        mask = self.causal(tokens)
        for layer in self.block.layers:
            attention = layer.attention
            query, key, value = self.heads(attention, attention.norm(h), branches * batch)
            scores = (query * scale) @ key.transpose(2, 3)
            weights = softmax(scores.float().masked_fill(mask, MASKED)).to(query.dtype)
            h = self.finish(layer, h, weights @ value)
        out = product(h, self.block.proj_out).float().view(branches, batch, tokens, -1)
        mix = (mix.flip(2) if self.block.reversed else mix).unsqueeze(2).unsqueeze(-1)  # (2, G, 1, T, 1)
        if not self.config.nvp:
            return x - self.shifted((out * mix[1]).sum(0)), torch.zeros_like(x[:, 0, 0])
        log_scale, shift = (
            self.shifted((part * weight).sum(0)) for part, weight in zip(out.chunk(2, -1), mix.unbind(0), strict=True)
        )
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
