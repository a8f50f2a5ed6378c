"""The parity card on a terminal."""

from __future__ import annotations

from ..quality.card import Card


def print_card(card: Card) -> None:
    """What was compared, a row for each part of it, and the certificate."""
    print(f"parity: {card.backend} against {card.oracle}: {card.method}, {card.samples} samples")
    print(f"  {'':<12} {'cosine':>12} {'norm ratio':>11} {'rms':>9} {'p99':>9} {'max':>9}")
    for name, d in card.rows():
        print(f"  {name:<12} {d.cosine:12.9f} {d.norm_ratio:11.7f} {d.rms:9.2g} {d.p99:9.2g} {d.max:9.2g}")
    print(f"  certificate {card.certificate:.2g}")
    if card.bits_per_dim_shift is not None:
        print(f"  largest shift of bits/dim {card.bits_per_dim_shift:.2g}")
