"""The parity card as Markdown: what was compared, on what, and how far it was off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.bundle import Manifest


def markdown(manifest: Manifest) -> str:
    """One page about a manifest's parity card; says so if the bundle was not verified."""
    config, card = manifest.config, manifest.parity
    lines = [
        f"# {manifest.name}, {manifest.precision}",
        "",
        f"{config.blocks} blocks x {config.layers} layers, width {config.width}, {config.tokens} patches "
        f"of {config.patch_dim}, "
        f"{config.classes or 'no'} classes, images {config.channels}x{config.image_size}x{config.image_size}.",
        "",
    ]
    if not card:
        return "\n".join([*lines, "Not verified: exported with --no-verify.", ""])
    lines += [
        f"{card['backend']} against {card['oracle']}: {card['method']}, {card['samples']} samples.",
        "",
        "| | cosine | norm ratio | rms | p99 | max |",
        "|---|---|---|---|---|---|",
        *(_row(f"block {block['block']}", block) for block in card.get("blocks", ())),
        *(_row(part, card[part]) for part in ("guided", "resident", "sample", "denoised") if part in card),
        "",
        f"Round-trip certificate {card['certificate']:.2g}.",
    ]
    if "bits_per_dim_shift" in card:
        lines.append(f"Largest shift of bits per dimension {card['bits_per_dim_shift']:.2g}.")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.exporter.items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _row(name: str, d: Mapping[str, Any]) -> str:
    return f"| {name} | {d['cosine']:.9f} | {d['norm_ratio']:.7f} | {d['rms']:.2g} | {d['p99']:.2g} | {d['max']:.2g} |"
