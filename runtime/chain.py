"""The blocks of a flow, one behind the other: decoded last to first, encoded first to last, and the gradient back.

Shapes: B images, T patches, D numbers in a patch; everything in patch order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .backend import Array, Backend, Branches, Doubles, Labels
from .bundle import ModelShape
from .decode import Parallel, solve
from .lanes import Lanes

OnStep = Callable[[int, int], None]  # told of block and position when a position is finished
OnBlock = Callable[[int, Array, float], None]  # told of block, patches (B, T, D), and seconds


class Ways(NamedTuple):
    """How each block is solved (None: serially), or in lanes all of them serially; and that in ``words``."""

    words: str
    blocks: tuple[Parallel | None, ...]
    lanes: Lanes | None = None

    @property
    def tolerance(self) -> float:
        """The loosest that any block is solved to; 0 where all are solved serially."""
        return max((way.tolerance for way in self.blocks if way is not None), default=0.0)


class Chain:
    """Every block on one engine. ``deviation`` (T, D) scales the noise that decoding begins with."""

    def __init__(self, config: ModelShape, backend: Backend, deviation: Array) -> None:
        self.config, self.backend, self.deviation = config, backend, deviation

    def decode(
        self, z: Array, branches: Branches, ways: Ways, on_step: OnStep, on_block: OnBlock | None = None
    ) -> tuple[Array, list[int]]:
        """Noise (B, T, D) -> patches, and each block's dependent passes, in block order."""
        x, passes = z * self.deviation, [0] * self.config.blocks
        for block in reversed(range(self.config.blocks)):
            started = time.perf_counter()
            watch = partial(on_step, block)
            if ways.lanes is not None:
                x, passes[block] = ways.lanes.solve(block, x, branches, watch), self.config.tokens - 1
            else:
                decoding = self.backend.decoding(block, x, branches)
                x, passes[block] = solve(decoding, self.config.tokens, ways.blocks[block], watch)
                decoding.close()
            if on_block is not None:
                on_block(block, x, time.perf_counter() - started)
        return x, passes

    def encode(self, x: Array, branches: Branches) -> tuple[list[Array], Doubles]:
        """The state before the first block, between blocks, and behind the last; log-determinants (B,) in nats, exact
        when guided too: what guidance changes of a patch is a function of earlier ones, so the Jacobian is triangular.
        """
        states, log_det = [x], np.zeros(len(x), np.float64)
        for block in range(self.config.blocks):
            state, block_log_det = self.backend.forward(block, states[-1], branches)
            states.append(state)
            log_det = log_det + block_log_det
        return states, log_det

    def denoise(self, x: Array, classes: Labels, strength: float, states: list[Array] | None = None) -> Array:
        """x + strength * sigma^2 * gradient, walked back through the blocks from the ``states`` of an unguided
        :meth:`encode` of x, which are used up.
        """
        assert self.config.noise_std is not None
        if states is None:
            states, _ = self.encode(x, Branches.plain(classes, self.config.tokens))
        grad = -states.pop()
        ones = np.ones(len(x), np.float32)
        for block in reversed(range(self.config.blocks)):
            grad = self.backend.gradient(block, states.pop(), classes, grad, ones)
        return x + np.float32(strength * self.config.noise_std**2) * grad

    def log_prob(self, latent: Array, log_det: Doubles) -> Doubles:
        """(B,): log-density, in nats, of samples that :meth:`encode` to this, under the noise they are drawn from: of
        standard deviation ``deviation``. Not finite for samples that are not.
        """
        with np.errstate(all="ignore"):
            deviation = self.deviation.astype(np.float64)
            energy = 0.5 * np.square(latent / deviation) + np.log(deviation) + 0.5 * math.log(2 * math.pi)
            return np.asarray(log_det - energy.sum((1, 2)))

    def round_trip(self, found: Array, z: Array) -> Array:
        """(B,): largest difference of encoded samples from the noise they were decoded from."""
        return np.asarray(np.abs(found - z * self.deviation).max((1, 2)))
