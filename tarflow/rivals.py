"""Other ways to sample, to be measured against: what is published, and what PyTorch's compiler makes of a static cache.

Both are our own words for them, on our own model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Block, TarFlow

Cache = list[tuple[Tensor, Tensor]]  # keys and values: of each position if it grows, else of each layer, full length
Caches = tuple[list[Cache], list[Cache]]  # growing ones, a layer each, with labels and without
_PROGRAMS = 200  # blocks times shapes: by default PyTorch gives up after eight, and runs the rest eagerly


@torch.inference_mode()
def published(model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """Noise (B, T, D) -> raw patches (B, T, D): eager PyTorch, a cache that grows by concatenation, and a second full
    pass for guidance (the published method).
    """
    x = noise * model.prior.sqrt()
    for block in reversed(model.blocks):
        x = block.order(x).clone()
        published_steps(block, x, labels, guidance, grown(block, len(x), 0, x), range(x.shape[1] - 1))
        x = block.order(x)
    return x


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

    def branch() -> list[Cache]:
        return [[entry() for _ in range(positions)] for _ in block.layers]

    return branch(), branch()


def _growing_step(
    block: Block, x: Tensor, position: Tensor, labels: Tensor | None, caches: list[Cache]
) -> tuple[Tensor, Tensor]:
    h = block.embed(x, labels) + position
    for layer, cache in zip(block.layers, caches, strict=True):
        query, key, value = layer.attention.split(h)
        cache.append((key, value))
        keys, values = (torch.cat(parts, 2) for parts in zip(*cache, strict=True))
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, keys, values))
        h = h + layer.mlp(h)
    return block.read_out(h)


class Compiled:
    """A step on a cache of full length, its position and all its state in place, compiled once for all positions of a
    block; on a CUDA device recorded as a graph, so that between steps the host does nothing but start the next.

    Guidance runs both branches as one batch. The model may be half, the sequence stays float32. Compiling takes a
    minute a block and batch size, at first use; ``compiled`` False runs PyTorch's own kernels.
    """

    def __init__(self, model: TarFlow, compiled: bool = True) -> None:
        self.model = model
        self._step: Callable[..., object] = _static_step
        if compiled:
            torch._dynamo.config.recompile_limit = _PROGRAMS
            self._step = torch.compile(_static_step, dynamic=False)
        self._state: _State | None = None
        self._steps: list[Callable[[], object]] = []

    @torch.inference_mode()
    def __call__(self, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Noise (B, T, D) float32 -> raw patches (B, T, D)."""
        if self._state is None or not self._state.fits(noise, labels, guidance):
            self._state = _State(self.model, noise, labels, guidance)
            self._steps = [self._recorded(k, self._state) for k in range(len(self.model.blocks))]
        state, x = self._state, noise * self.model.prior.float().sqrt()
        for k in reversed(range(len(self.model.blocks))):
            block = self.model.blocks[k]
            state.begin(block.order(x), labels)
            for _ in range(x.shape[1] - 1):
                self._steps[k]()
            x = block.order(state.x).clone()
        return x

    def _recorded(self, k: int, state: _State) -> Callable[[], object]:
        """Block ``k``'s step on this state."""
        step = partial(self._step, self.model.blocks[k], state.places[k], state)
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
    """What the steps of :class:`Compiled` read and write, at fixed addresses: a recording knows no others.

    The cache has a tensor for the keys of each layer and one for its values: the compiler writes those in place, but
    copies all of one tensor that holds them together.
    """

    def __init__(self, model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> None:
        config, like, self.guidance = model.config, model.blocks[0].proj_in.weight, guidance
        branches = 2 if guidance > 0 else 1
        self.x, self.z = torch.empty_like(noise), torch.empty_like(noise)
        self.position = torch.zeros(1, dtype=torch.int64, device=noise.device)
        self.labels = None if labels is None else torch.full_like(labels, -1).repeat(branches)
        self.places = [block.order(block.pos_embed, 0).contiguous() for block in model.blocks]
        shape = (len(noise) * branches, config.heads, config.tokens, config.head_dim)
        new = partial(torch.zeros, shape, dtype=like.dtype, device=like.device)
        self.cache: Cache = [(new(), new()) for _ in range(config.layers)]

    def fits(self, noise: Tensor, labels: Tensor | None, guidance: float) -> bool:
        return (self.x.shape, self.labels is None, self.guidance) == (noise.shape, labels is None, guidance)

    def begin(self, z: Tensor, labels: Tensor | None) -> None:
        """A block on z (B, T, D) in block order, with the labels of the first branch."""
        self.x.copy_(z)
        self.z.copy_(z)
        self.position.zero_()
        if self.labels is not None and labels is not None:
            self.labels[: len(labels)] = labels


def _static_step(block: Block, places: Tensor, state: _State) -> None:
    x, position, batch, guidance = state.x, state.position, len(state.x), state.guidance
    patch = x.index_select(1, position).to(places.dtype)
    if guidance > 0:
        patch = patch.repeat(2, 1, 1)
    h = block.embed(patch, state.labels) + places.index_select(0, position)
    seen = (torch.arange(block.config.tokens, device=x.device) <= position).unsqueeze(0)  # (1, T)
    for layer, (keys, values) in zip(block.layers, state.cache, strict=True):
        query, key, value = layer.attention.split(h)
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, keys, values, attn_mask=seen))
        h = h + layer.mlp(h)
    log_scale, shift = (part.float() for part in block.read_out(h))
    if guidance > 0:
        log_scale, shift = (part[:batch] * (1 + guidance) - part[batch:] * guidance for part in (log_scale, shift))
    following = position + 1
    x.index_copy_(1, following, state.z.index_select(1, following) * log_scale.exp() + shift)
    position.copy_(following)
