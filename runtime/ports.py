"""Inputs and outputs of every kind of graph: names, axes, types. FORMAT.md, "Graphs", is the normative text.

Below all providers, and below the exporter, which gives its graphs these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .bundle import FUSED, RESIDENT, ModelShape

POSITION = "position"  # never written in place: engines may write it before the last operator that reads it
MASKED = -1e30  # score of what is not seen: exp() of it is exactly 0, and unlike -inf no backend stumbles over it
_NEXT = "_next"
Axis = str | int  # the name of a size that varies, or what the model fixes
Contents = Literal["number", "index", "cache"]  # float32, int64, or in the bundle's precision


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph."""

    name: str
    axes: tuple[Axis, ...]
    holds: Contents = "number"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that vary: B images, G guidance branches, W positions in a window, S slots of a cache on the host."""

    batch: int
    branches: int = 1
    window: int = 1
    slots: int = 0

    @property
    def rows(self) -> int:
        return self.branches * self.batch

    @property
    def patches(self) -> int:
        return self.batch * self.window

    def of(self, axis: Axis) -> int:
        """An axis in numbers."""
        return axis if isinstance(axis, int) else sum(getattr(self, part) for part in axis.split(" + "))


def inputs(config: ModelShape, kind: str) -> tuple[Port, ...]:
    """The inputs of a graph, in its order."""
    return _INPUTS[kind](config)


def outputs(config: ModelShape, kind: str) -> tuple[Port, ...]:
    """The outputs of a graph, in its order."""
    if kind == "step":
        fresh = ("2 * layers * rows", config.heads, "window", config.head_dim)
        return Port("x_next", ("patches", config.patch_dim)), Port("fresh", fresh, "cache")
    if kind == "forward":
        return _sequence(config, "z"), Port("log_det", ("batch",))
    if kind == "gradient":
        return (_sequence(config, "grad_x"),)
    return tuple(Port(next_name(p.name), p.axes, p.holds) for p in inputs(config, kind) if is_state(p.name))


def shapes(config: ModelShape, kind: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs, in its order."""
    return {port.name: shape(port, sizes) for port in inputs(config, kind)}


def shape(port: Port, sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes.of(axis) for axis in port.axes)


def is_state(name: str) -> bool:
    """Whether an input of a resident graph comes back as an output, with ``_next`` behind its name."""
    return name in ("x", POSITION) or name.startswith(("key_", "value_"))


def next_name(name: str) -> str:
    """The output that a state input becomes."""
    return name + _NEXT


def _step(config: ModelShape) -> tuple[Port, ...]:
    return (
        Port("x", ("patches", config.patch_dim)),
        Port("z", ("patches", config.patch_dim)),
        Port("index", ("patches",), "index"),
        Port("labels", ("branches", "patches"), "index"),
        Port("mix", ("branches", "patches", config.patch_dim * (2 if config.nvp else 1))),
        Port("query_scale", ("rows", 1, 1, 1)),
        Port("bias", ("window", "slots + window")),
        *_cache(config, "slots"),
    )


def _forward(config: ModelShape) -> tuple[Port, ...]:
    return _sequence(config, "x"), *_branched(config)


def _gradient(config: ModelShape) -> tuple[Port, ...]:
    labels = Port("labels", (1, "batch"), "index")
    return _sequence(config, "x"), labels, _sequence(config, "grad_z"), Port("grad_log_det", ("batch",))


def _resident(config: ModelShape) -> tuple[Port, ...]:
    return (
        Port("x", ("batch", 1, config.tokens, config.patch_dim)),
        Port(POSITION, (1,), "index"),
        _sequence(config, "z"),
        Port("offsets", ("window",), "index"),
        *_branched(config),
        *_cache(config, config.tokens),
    )


def _fused(config: ModelShape) -> tuple[Port, ...]:
    return tuple(port for port in _resident(config) if port.name != "offsets")


_INPUTS = {"step": _step, "forward": _forward, "gradient": _gradient, RESIDENT: _resident}
_INPUTS |= dict.fromkeys(FUSED.values(), _fused)


def _sequence(config: ModelShape, name: str) -> Port:
    return Port(name, ("batch", config.tokens, config.patch_dim))


def _branched(config: ModelShape) -> tuple[Port, ...]:
    return (
        Port("labels", ("branches", "batch"), "index"),
        Port("mix", (2, "branches", config.tokens)),
        Port("inverse_temperature", ("branches",)),
    )


def _cache(config: ModelShape, slots: Axis) -> tuple[Port, ...]:
    axes = ("rows", config.heads, slots, config.head_dim)
    return tuple(Port(f"{part}_{layer}", axes, "cache") for layer in range(config.layers) for part in ("key", "value"))
