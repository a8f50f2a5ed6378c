"""TarFlow in PyTorch: a stack of autoregressive flow blocks over image patches (arXiv 2412.06329).

Shapes: B images, T patches in a sequence, D numbers in a patch, C width, H heads, d head dimension,
G guidance branches (1, or 2 when guided). Read bottom-up: attention, layer, block, flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config


class Cache:
    """Keys and values of one block while it is decoded: per layer (B, H, T, d), written by position."""

    def __init__(self, config: Config, batch: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.heads, config.tokens, config.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)

    def extend(self, layer: int, position: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position of one layer; return all keys and values up to and including it."""
        self.keys[layer, :, :, position] = key[:, :, 0]
        self.values[layer, :, :, position] = value[:, :, 0]
        return self.keys[layer, :, :, : position + 1], self.values[layer, :, :, : position + 1]


@dataclass(slots=True)
class Branch:
    """One of the passes that guidance mixes: whose labels (None: the null class), how sharp, and its own cache."""

    labels: Tensor | None
    temperature: float
    cache: Cache


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> query, key, value, each (B, H, T, d)."""
        batch, tokens, _ = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, tokens, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, H, T, d) -> (B, T, C)."""
        merged: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return merged

    def forward(self, h: Tensor, temperature: float = 1.0) -> Tensor:
        query, key, value = self.split(h)
        scale = self.head_dim**-0.5 / temperature
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale))

    def step(self, h: Tensor, cache: Cache, layer: int, position: int, temperature: float) -> Tensor:
        """One position against the cache: (B, 1, C) -> (B, 1, C)."""
        query, key, value = self.split(h)
        keys, values = cache.extend(layer, position, key, value)
        scale = self.head_dim**-0.5 / temperature
        return self.merge(F.scaled_dot_product_attention(query, keys, values, scale=scale))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def mlp(self, h: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(self.norm(h))))
        return out

    def forward(self, h: Tensor, temperature: float = 1.0) -> Tensor:
        h = h + self.attention(h, temperature)
        return h + self.mlp(h)

    def step(self, h: Tensor, cache: Cache, layer: int, position: int, temperature: float) -> Tensor:
        h = h + self.attention.step(h, cache, layer, position, temperature)
        return h + self.mlp(h)


class Block(nn.Module):
    """One flow: an affine map of each patch whose scale and shift come from the patches before it.

    Odd blocks read the sequence backwards, patches and position embedding alike.
    """

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config = config
        self.reversed = index % 2 == 1
        self.proj_in = nn.Linear(config.patch_dim, config.width)
        self.pos_embed = nn.Parameter(torch.randn(config.tokens, config.width) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(config.classes, 1, config.width) * 1e-2) if config.classes else None
        self.layers: Sequence[Layer] = nn.ModuleList([Layer(config) for _ in range(config.layers)])  # type: ignore[assignment]
        self.proj_out = nn.Linear(config.width, config.patch_dim * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)  # a fresh flow is (nearly) the identity

    def order(self, sequence: Tensor, dim: int = 1) -> Tensor:
        """Patch order to block order, and back: it is its own inverse."""
        return sequence.flip(dim) if self.reversed else sequence

    def embed(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Patches (B, t, D) -> (B, t, C), without positions. A label below 0, or none at all, is the null class."""
        h: Tensor = self.proj_in(x)
        if self.class_embed is None:
            return h
        null = self.class_embed.mean(0)  # (1, C)
        if labels is None:
            return h + null
        known = F.embedding(labels.clamp(min=0), self.class_embed[:, 0]).unsqueeze(1)  # (B, 1, C)
        return h + torch.where((labels < 0).view(-1, 1, 1), null, known)

    def read_out(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t, C) -> log_scale and shift of the *next* patch, (B, t, D) each."""
        out = self.proj_out(h)
        if self.config.nvp:
            log_scale, shift = out.chunk(2, dim=-1)
            return log_scale, shift
        return torch.zeros_like(out), out

    def encode(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> z (B, T, D) and the log-determinant in nats, (B,). All positions at once."""
        x = self.order(x)
        h = self.embed(x, labels) + self.order(self.pos_embed, 0)
        for layer in self.layers:
            h = layer(h)
        log_scale, shift = (F.pad(part[:, :-1], (0, 0, 1, 0)) for part in self.read_out(h))
        z = (x - shift) * torch.exp(-log_scale.float()).to(log_scale.dtype)
        return self.order(z), -log_scale.float().sum((1, 2))

    def step(self, x: Tensor, position: int, branches: list[Branch], mix: Tensor) -> tuple[Tensor, Tensor]:
        """The patch at ``position``, x (B, 1, D) in block order -> log_scale and shift of the next, (B, 1, D) each.

        ``mix`` (2, G) weighs the branches' log_scale (row 0) and shift (row 1).
        """
        at = self.config.tokens - 1 - position if self.reversed else position
        log_scale = shift = torch.zeros_like(x)
        for g, branch in enumerate(branches):
            h = self.embed(x, branch.labels) + self.pos_embed[at]
            for j, layer in enumerate(self.layers):
                h = layer.step(h, branch.cache, j, position, branch.temperature)
            branch_log_scale, branch_shift = self.read_out(h)
            log_scale = log_scale + mix[0, g] * branch_log_scale
            shift = shift + mix[1, g] * branch_shift
        return log_scale, shift

    def branches(self, z: Tensor, labels: Iterable[Tensor | None], temperatures: Iterable[float]) -> list[Branch]:
        """Those that decode z (B, T, D), their caches empty."""
        return [Branch(one, t, Cache(self.config, len(z), z)) for one, t in zip(labels, temperatures, strict=True)]

    def decode(self, z: Tensor, labels: list[Tensor | None], mix: Tensor, temperatures: list[float]) -> Tensor:
        """z (B, T, D) -> x (B, T, D), one position after the other.

        Each of the G guidance branches has its ``labels[g]`` and ``temperatures[g]``; ``mix`` (2, G, T) weighs them
        at each step.
        """
        z = self.order(z)
        branches, x = self.branches(z, labels, temperatures), [z[:, :1]]
        for i in range(self.config.tokens - 1):
            log_scale, shift = self.step(x[-1], i, branches, mix[:, :, i])
            x.append(z[:, i + 1 : i + 2] * log_scale.exp() + shift)
        return self.order(torch.cat(x, 1))


class TarFlow(nn.Module):
    """The whole flow. ``encode`` maps images to latents, ``decode`` maps noise to images."""

    prior: Tensor
    noise_from: str = ""  # where the training noise was read, in words; "" of a model that was trained here

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks: Sequence[Block] = nn.ModuleList([Block(config, k) for k in range(config.blocks)])  # type: ignore[assignment]
        self.register_buffer("prior", torch.ones(config.tokens, config.patch_dim))  # variance of each latent

    def patchify(self, images: Tensor) -> Tensor:
        """(B, channels, size, size) -> (B, T, D), in ``unfold`` order: channel, row, column."""
        p = self.config.patch_size
        return F.unfold(images, p, stride=p).transpose(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, channels, size, size)."""
        size, p = self.config.image_size, self.config.patch_size
        return F.fold(x.transpose(1, 2), (size, size), p, stride=p)

    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images -> latent z (B, T, D) and log-determinant (B,) in nats per dimension, as the reference counts it."""
        x = self.patchify(images)
        log_det = torch.zeros(len(x), device=x.device)
        for block in self.blocks:
            x, block_log_det = block.encode(x, labels)
            log_det = log_det + block_log_det
        return x, log_det / x[0].numel()

    forward = encode  # so that DistributedDataParallel, which calls forward, can train it

    def loss(self, z: Tensor, log_det: Tensor) -> Tensor:
        """Negative log-likelihood per dimension in nats, without the constant (the paper's training objective)."""
        return 0.5 * z.float().pow(2).mean() - log_det.mean()

    @torch.no_grad()
    def decode(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        guidance: float = 0.0,
        what: str = "ab",
        annealed: bool = False,
        attention_temperature: float = 1.0,
    ) -> Tensor:
        """Noise (B, T, D) -> images, before denoising. Guidance as in the paper.

        The guided log_scale ("a") and shift ("b") are ``(1 + g) * conditional - g * unconditional``, with g
        constant or growing linearly to ``guidance``; the temperature divides the unconditional logits only.
        """
        branches, temperatures = [labels], [1.0]
        if guidance > 0:
            branches, temperatures = [labels, None], [1.0, attention_temperature]
        mix = guidance_mix(self.config.tokens, guidance, what, annealed).to(noise)
        x = noise * self.prior.sqrt()
        for block in reversed(self.blocks):
            x = block.decode(x, branches, mix, temperatures)
        return self.unpatchify(x)

    def denoise(self, images: Tensor, labels: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """One step along the score (Tweedie): x + strength * sigma^2 * grad log p(x)."""
        if self.config.noise_std is None:
            raise ValueError("a model trained with uniform dequantisation has no Gaussian noise to remove")
        with torch.enable_grad():
            images = images.detach().requires_grad_(True)
            z, log_det = self.encode(images, labels)
            log_likelihood = (log_det - 0.5 * z.pow(2).mean((1, 2))).sum() * z[0].numel()
            (score,) = torch.autograd.grad(log_likelihood, images)
        return (images + strength * self.config.noise_std**2 * score).detach()


def guidance_mix(tokens: int, guidance: float, what: str, annealed: bool) -> Tensor:
    """Weights (2, G, T) of the branches' log_scale and shift at each step; G is 1 without guidance."""
    if guidance <= 0:
        return torch.ones(2, 1, tokens)
    ramp = (torch.arange(tokens, dtype=torch.float64) + 1) / max(tokens - 1, 1) if annealed else torch.ones(tokens)
    scale = torch.stack([guidance * ramp * (part in what) for part in "ab"])  # (2, T)
    return torch.stack([1 + scale, -scale], 1).float()


def bits_per_dim(loss: Tensor) -> Tensor:
    """Loss in nats per dimension -> bits per dimension of 8-bit images in [-1, 1] units."""
    return (loss + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
