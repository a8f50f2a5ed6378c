"""Other ways to sample, to be measured against: what is published, and what PyTorch's compiler makes of a static cache.

Both are our own words for them, on our own model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .model import Block, TarFlow

GrowingCache = list[tuple[Tensor, Tensor]]
StaticCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (rows, heads, T, head_dim)
_PROGRAMS = 200  # blocks times shapes
Caches = tuple[list[GrowingCache], list[GrowingCache]]  # a layer each, with labels and without


@torch.inference_mode()
def published(model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """Noise (B, T, D) -> raw patches (B, T, D): eager PyTorch, a cache that grows by concatenation, and a second full
    pass for guidance (the published method).
    """
    x = noise * model.prior.sqrt()
    for block in reversed(model.blocks):
        x = _published_block(block, x, labels, guidance)
    return x


def _published_block(block: Block, z: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    x = block.order(z).clone()
    published_steps(block, x, labels, guidance, grown(block, len(x), 0, x), range(x.shape[1] - 1))
    return block.order(x)


@torch.inference_mode()
def published_steps(
    block: Block, x: Tensor, labels: Tensor | None, guidance: float, caches: Caches, positions: Iterable[int]
) -> None:
    """Some of a block's steps, in place on x (B, T, D) in block order; ``caches`` hold the positions before them."""
    places = block.order(block.pos_embed, 0)
    conditional, unconditional = caches
    for i in positions:
        log_scale, shift = _growing_step(block, x[:, i : i + 1], places[i], labels, conditional)
        if guidance > 0:
            null_log_scale, null_shift = _growing_step(block, x[:, i : i + 1], places[i], None, unconditional)
            log_scale = log_scale + guidance * (log_scale - null_log_scale)
            shift = shift + guidance * (shift - null_shift)
        x[:, i + 1] = x[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]


def grown(block: Block, batch: int, positions: int, like: Tensor) -> Caches:
    """Caches as so many steps leave them, of random numbers: for steps that are to be timed, not believed."""
    config = block.config

    def entry() -> tuple[Tensor, Tensor]:
        qkv = torch.randn(batch, 1, 3, config.heads, config.head_dim, dtype=like.dtype, device=like.device)
        _, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def branch() -> list[GrowingCache]:
        return [[entry() for _ in range(positions)] for _ in block.layers]

    return branch(), branch()


def _growing_step(
    block: Block, x: Tensor, position: Tensor, labels: Tensor | None, caches: list[GrowingCache]
) -> tuple[Tensor, Tensor]:
    h = block.embed(x, labels) + position
    for layer, cache in zip(block.layers, caches, strict=True):
        query, key, value = layer.attention.split(h)
        cache.append((key, value))
        keys, values = (torch.cat(parts, 2) for parts in zip(*cache, strict=True))
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, keys, values))
        h = h + layer.mlp(h)
    return block.read_out(h)


def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for every block and shape: by default PyTorch gives up after eight, and runs the rest eagerly."""
    torch._dynamo.config.recompile_limit = _PROGRAMS
    return torch.compile(step, dynamic=False)


def _static_cache(config: Config, rows: int, like: Tensor) -> StaticCache:
    """Empty, a tensor for the keys of each layer and one for its values: the compiler writes those in place, but copies
    all of one tensor that holds them together.
    """
    shape = (rows, config.heads, config.tokens, config.head_dim)
    new = partial(torch.zeros, shape, dtype=like.dtype, device=like.device)
    return [(new(), new()) for _ in range(config.layers)]


class Compiled:
    """A step on a cache of full length, position as a tensor, compiled once for all positions of a block.

    Guidance runs both branches as one batch. Compiling takes a minute a block and batch size, at first use.
    """

    def __init__(self, model: TarFlow) -> None:
        self.model = model
        self.step = _compiled(_static_step)

    @torch.inference_mode()
    def __call__(self, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Noise (B, T, D) -> raw patches (B, T, D)."""
        config, x = self.model.config, noise * self.model.prior.sqrt()
        rows = len(x) * (2 if guidance > 0 else 1)
        cache = _static_cache(config, rows, x)
        doubled = labels
        if guidance > 0 and labels is not None:
            doubled = torch.cat([labels, torch.full_like(labels, -1)])
        places = torch.arange(config.tokens, device=x.device)
        for block in reversed(self.model.blocks):
            z = block.order(x)
            x, positions = z.clone(), block.order(block.pos_embed, 0)
            for i in range(config.tokens - 1):
                at = places[i : i + 1]
                patch = x[:, i : i + 1].repeat(2, 1, 1) if guidance > 0 else x[:, i : i + 1].clone()
                log_scale, shift = self.step(block, patch, positions[i : i + 1].clone(), doubled, cache, at)
                if guidance > 0:
                    log_scale, shift = (
                        part[: len(x)] * (1 + guidance) - part[len(x) :] * guidance for part in (log_scale, shift)
                    )
                x[:, i + 1] = x[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]
            x = block.order(x)
        return x


class Captured:
    """The static-cache step with its state in place, recorded once a block as a CUDA graph: between steps the host
    does nothing but start the next. The model may be half, the sequence stays float32. On a CPU the step is called.

    ``compiled`` False records PyTorch's own kernels. Serves one batch size and guidance, those of the first call.
    """

    def __init__(self, model: TarFlow, compiled: bool = True) -> None:
        self.model = model
        self._step = _compiled(_whole_step) if compiled else _whole_step
        self._state: _State | None = None
        self._steps: dict[int, Callable[[], object]] = {}
        self._places: dict[int, Tensor] = {}  # a recording knows addresses only: what lies there must stay

    @torch.inference_mode()
    def __call__(self, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Noise (B, T, D) float32 -> raw patches (B, T, D)."""
        if self._state is None:
            self._state = _State(self.model, noise, labels, guidance)
        state, x = self._state, noise * self.model.prior.float().sqrt()
        state.label(labels)
        for k in reversed(range(len(self.model.blocks))):
            block = self.model.blocks[k]
            if k not in self._steps:
                self._places[k] = block.order(block.pos_embed, 0).contiguous()
                self._steps[k] = self._record(block, self._places[k], state, guidance)
            ordered = block.order(x)
            state.x.copy_(ordered)
            state.z.copy_(ordered)
            state.position.zero_()
            for _ in range(x.shape[1] - 1):
                self._steps[k]()
            x = block.order(state.x).clone()
        return x

    def _record(self, block: Block, places: Tensor, state: _State, guidance: float) -> Callable[[], object]:
        def step() -> None:
            self._step(block, state.x, state.z, state.position, state.labels, places, state.cache, guidance)

        if state.x.device.type != "cuda":
            return step
        state.position.zero_()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and loads what cannot be loaded while recording
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


class _State:
    """What :class:`Captured` steps read and write, at fixed addresses."""

    def __init__(self, model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> None:
        config, branches = model.config, 2 if guidance > 0 else 1
        self.x, self.z = torch.empty_like(noise), torch.empty_like(noise)
        self.position = torch.zeros(1, dtype=torch.int64, device=noise.device)
        self.labels = None if labels is None else torch.full_like(labels, -1).repeat(branches)
        self.cache = _static_cache(config, len(noise) * branches, model.blocks[0].proj_in.weight)

    def label(self, labels: Tensor | None) -> None:
        if self.labels is not None and labels is not None:
            self.labels[: len(labels)] = labels


def _whole_step(
    block: Block,
    x: Tensor,
    z: Tensor,
    position: Tensor,
    labels: Tensor | None,
    places: Tensor,
    cache: StaticCache,
    guidance: float,
) -> None:
    batch, following = len(x), position + 1
    patch = x.index_select(1, position).to(places.dtype)
    if guidance > 0:
        patch = patch.repeat(2, 1, 1)
    outputs = _static_step(block, patch, places.index_select(0, position), labels, cache, position)
    log_scale, shift = (part.float() for part in outputs)
    if guidance > 0:
        log_scale, shift = (part[:batch] * (1 + guidance) - part[batch:] * guidance for part in (log_scale, shift))
    x.index_copy_(1, following, z.index_select(1, following) * log_scale.exp() + shift)
    position.copy_(following)


def _static_step(
    block: Block, x: Tensor, place: Tensor, labels: Tensor | None, cache: StaticCache, at: Tensor
) -> tuple[Tensor, Tensor]:
    h = block.embed(x, labels) + place
    seen = (torch.arange(block.config.tokens, device=x.device) <= at).unsqueeze(0)  # (1, T)
    for layer, (keys, values) in zip(block.layers, cache, strict=True):
        query, key, value = layer.attention.split(h)
        keys.index_copy_(2, at, key)
        values.index_copy_(2, at, value)
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, keys, values, attn_mask=seen))
        h = h + layer.mlp(h)
    return block.read_out(h)
