"""The parity card as Markdown: what was compared, on what, and how far it was off."""

from __future__ import annotations

from ..quality.card import Card, Difference
from ..runtime.bundle import Manifest


def markdown(manifest: Manifest, card: Card | None) -> str:
    """One page about a bundle and its parity card; None: it was not verified."""
    config = manifest.config
    lines = [
        f"# {manifest.name}, {manifest.precision}",
        "",
        f"{config.blocks} blocks x {config.layers} layers, width {config.width}, {config.tokens} patches "
        f"of {config.patch_dim}, "
        f"{config.classes or 'no'} classes, images {config.channels}x{config.image_size}x{config.image_size}.",
        "",
    ]
    if card is None:
        return "\n".join([*lines, "Not verified when it was exported.", ""])
    lines += [
        f"{card.backend} against {card.oracle}: {card.method}, {card.samples} samples.",
        "",
        "| | cosine | norm ratio | rms | p99 | max |",
        "|---|---|---|---|---|---|",
        *(_row(name, difference) for name, difference in card.rows()),
        "",
        f"Round-trip certificate {card.certificate:.2g}.",
    ]
    if card.bits_per_dim_shift is not None:
        lines.append(f"Largest shift of bits per dimension {card.bits_per_dim_shift:.2g}.")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.exporter.items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _row(name: str, d: Difference) -> str:
    return f"| {name} | {d.cosine:.9f} | {d.norm_ratio:.7f} | {d.rms:.2g} | {d.p99:.2g} | {d.max:.2g} |"
