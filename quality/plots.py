"""Plots as SVG, pictures as PNG inside a page: text that follows the page's colours and fonts, and loads nothing."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.image import png, to_uint8
from ..runtime.noise import normal_quantile

Numbers = NDArray[np.float64]
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 48, 12, 12, 44  # of a plot, in its own units
_BINS = 40
_LETTER = 7.5  # of a number below an axis, in the plot's units


@dataclass(frozen=True, slots=True)
class Axis:
    """Values low ... high on pixels start ... stop; ``decades`` marks whole powers of ten, values being exponents."""

    low: float
    high: float
    start: float
    stop: float
    decades: bool = False

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, wanted: int = 8) -> list[tuple[float, str]]:
        """Round numbers inside, and how they are written."""
        if self.decades:
            span = self.high - self.low
            factors = tuple(range(1, 10)) if span < 0.8 else (1, 2, 5) if span < 2.5 else (1,)
            every = math.ceil(span / wanted)
            powers = range(math.floor(self.low), math.ceil(self.high) + 1, every)
            marks = [(power + math.log10(factor), f"{factor}e{power}") for power in powers for factor in factors]
            return [mark for mark in marks if self.low <= mark[0] <= self.high]
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(k * step, f"{k * step:.10g}") for k in range(first, last + 1)]


def histogram(series: dict[str, Numbers], label: str, title: str, decades: bool = False) -> str:
    """Histograms over each other, each of area 1; with ``decades`` of the values' decimal logarithms. Finite values."""
    shown = {name: np.log10(np.maximum(v, 1e-12)) if decades else v for name, v in series.items()}
    shown = {name: v[np.isfinite(v)] for name, v in shown.items() if np.isfinite(v).any()}
    if not shown:
        return "<p>No finite value.</p>"
    everything = np.concatenate(list(shown.values()))
    low, high = float(everything.min()), float(everything.max())
    if decades:
        low, high = low - 0.15, high + 0.15
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    heights = {name: np.histogram(v, edges, density=True)[0] for name, v in shown.items()}
    across, up = _across(low, high, decades), _up(0, 1.08 * max(float(h.max()) for h in heights.values()), 220)
    parts = []
    for k, counts in enumerate(heights.values()):
        bars = "".join(
            f"M{across.at(left):.1f} {up.start:.1f}V{up.at(h):.1f}H{across.at(right):.1f}V{up.start:.1f}Z"
            for left, right, h in zip(edges, edges[1:], counts, strict=False)
            if h
        )
        parts.append(f'<path class="fill s{k}" d="{bars}"/>')
    return _plot(220, title, [*_grid(across, up, label), *parts, *_legend(list(shown))])


def quantiles(series: dict[str, Numbers], title: str) -> str:
    """Quantiles against those of the standard normal distribution, which is the diagonal."""
    reach = 4.0
    across, up = _across(-reach, reach), _up(-reach, reach, 340)
    parts = [f'<path class="rule" d="M{across.start} {up.start}L{across.stop} {up.stop}"/>']
    for k, values in enumerate(series.values()):
        count = min(len(values), 401)
        u = (np.arange(count) + 0.5) / count
        points = zip(normal_quantile(u), np.clip(np.quantile(values, u), -reach, reach), strict=True)
        dots = "".join(f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2"/>' for x, y in points)
        parts.append(f'<g class="dots s{k}">{dots}</g>')
    frame = _grid(across, up, "standard normal quantile", "latent quantile")
    return _plot(340, title, [*frame, *parts, *_legend(list(series))])


def bars(rows: Sequence[tuple[str, float, str]], title: str) -> str:
    """Horizontal bars: (name, length, text at its end)."""
    height, left = 26 * len(rows) + 8, 96
    longest = max((length for _, length, _ in rows), default=0) or 1.0
    parts = []
    for k, (name, length, text) in enumerate(rows):
        y, end = 26 * k + 6, left + (_WIDTH - left - 130) * length / longest
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 13}">{html.escape(name)}</text>')
        parts.append(f'<path class="fill s0" d="M{left} {y}H{end:.1f}V{y + 18}H{left}Z"/>')
        parts.append(f'<text x="{end + 8:.1f}" y="{y + 13}">{html.escape(text)}</text>')
    return _plot(height, title, parts)


def picture(images: NDArray[np.float32], alt: str, gap: int = 1) -> str:
    """Images (N, C, H, W) side by side in one PNG, transparent between them; not finite: black."""
    n, c, h, w = images.shape
    zoom = max(1, 48 // h)  # browsers enlarge evenly, PDF readers do not
    gap *= zoom
    strip = np.zeros((h * zoom, n * (w * zoom + gap) - gap, 4), np.uint8)
    for i, image in enumerate(to_uint8(images)):
        pixels = image.transpose(1, 2, 0)[:, :, : 3 if c >= 3 else 1].repeat(zoom, 0).repeat(zoom, 1)
        left = i * (w * zoom + gap)
        strip[:, left : left + w * zoom, :3], strip[:, left : left + w * zoom, 3] = pixels, 255
    return _png(strip, alt, width=n * (w * zoom + gap) - gap)


def heat_map(values: Numbers, reach: float, alt: str) -> str:
    """Values (rows, columns) as colours: none at 0, full at ``reach``, red above and blue below."""
    share = np.clip(values / reach, -1, 1)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where(share[..., None] > 0, (200, 62, 48), (38, 110, 190))
    pixels[..., 3] = np.rint(255 * np.abs(share))
    zoom = max(1, 200 // max(values.shape))
    return _png(pixels.repeat(zoom, 0).repeat(zoom, 1), alt, width=200)


def _png(pixels: NDArray[np.uint8], alt: str, width: int) -> str:
    text = base64.b64encode(png(pixels, {})).decode()
    return f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{text}">'


def _across(low: float, high: float, decades: bool = False) -> Axis:
    return Axis(low, high, _LEFT, _WIDTH - _RIGHT, decades)


def _up(low: float, high: float, height: int) -> Axis:
    return Axis(low, high, height - _BOTTOM, _TOP)


def _grid(across: Axis, up: Axis, label: str, side: str = "") -> list[str]:
    """The frame: marks and numbers below, and, if that ``side`` has a label, at the left, with lines across."""
    parts = [f'<path class="frame" d="M{across.start} {up.start}H{across.stop}"/>']
    taken: list[tuple[float, float]] = []
    for value, text in sorted(across.ticks(), key=lambda tick: not tick[1].startswith("1e")):  # whole decades first
        x, half = across.at(value), _LETTER * (len(text) + 1) / 2
        parts.append(f'<path class="frame" d="M{x:.1f} {up.start}v5"/>')
        if all(x + half < left or right < x - half for left, right in taken):  # else there is no room for a number
            taken.append((x - half, x + half))
            parts.append(f'<text class="below" x="{x:.1f}" y="{up.start + 19:.1f}">{text}</text>')
    middle = (across.start + across.stop) / 2
    parts.append(f'<text class="below label" x="{middle}" y="{up.start + 37:.1f}">{html.escape(label)}</text>')
    if not side:
        return parts
    for value, text in up.ticks(6):
        y = up.at(value)
        parts.append(f'<path class="grid" d="M{across.start} {y:.1f}H{across.stop}"/>')
        parts.append(f'<text class="name" x="{across.start - 8}" y="{y + 4:.1f}">{text}</text>')
    y = (up.start + up.stop) / 2
    parts.append(f'<text class="below label" transform="translate(14 {y}) rotate(-90)">{html.escape(side)}</text>')
    return parts


def _legend(names: list[str]) -> list[str]:
    if len(names) < 2:
        return []
    parts = []
    for k, name in enumerate(names):
        y = _TOP + 10 + 18 * k
        parts.append(f'<path class="fill s{k}" d="M{_LEFT + 14} {y - 9}h11v11h-11Z"/>')
        parts.append(f'<text x="{_LEFT + 32}" y="{y + 1}">{html.escape(name)}</text>')
    return parts


def _plot(height: int, title: str, parts: list[str]) -> str:
    name = html.escape(title)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
