"""What was found of a bundle as one page of HTML: nothing loaded, light and dark, printable."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from ..runtime.backend import Array
from ..runtime.bundle import MANIFEST
from ..runtime.errors import BundleError
from . import plots
from .card import Card
from .examine import Examination

_PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
_ROW = 16  # samples of a class in the grid
_CLASSES = 20  # rows of the grid


@dataclass(frozen=True, slots=True)
class Making:
    """How a report was made: the command that makes it again, the date, and versions by package."""

    command: str
    date: str
    versions: Mapping[str, str]


def render(found: Examination, making: Making) -> str:
    """The page: self-contained HTML that asks no network for anything."""
    sections = [_samples, _blocks, _latents, _likelihood, _certificates, _times, _parity]
    return _PAGE.substitute(
        name=html.escape(found.bundle.manifest.name),
        style=_STYLE,
        model=html.escape(_model(found)),
        figures=_key_figures(found),
        sections="".join([*(section(found) for section in sections), _provenance(found, making)]),
        version=html.escape(making.versions.get("tarflow", "")),
        date=html.escape(making.date),
    )


# --- sections, in reading order -------------------------------------------------------------------------------------


def _model(found: Examination) -> str:
    m, c = found.bundle.manifest, found.bundle.manifest.config
    kind = "affine" if c.nvp else "volume-preserving"
    classes = f"{c.classes} classes" if c.classes else "no classes"
    return (
        f"{m.precision} bundle, images {c.channels} x {c.image_size} x {c.image_size}, {classes}; {c.blocks} {kind} "
        f"blocks of {c.layers} layers, width {c.width}, {c.tokens} patches of {c.patch_dim} numbers."
    )


def _key_figures(found: Examination) -> str:
    n = found.request.n
    doubtful, limit = _suspects(found), found.report.suspect_above
    round_trip = f"largest error; {len(doubtful)} above {limit:g} are suspect" if doubtful else "largest of any sample"
    per_sample = 1000 * sum(found.block_seconds) / n
    rows = [
        ("samples", f"{n}", f"seed {found.request.seed}, guidance {found.request.guidance.scale:g}"),
        ("not finite", f"{len(found.nonfinite)}", "must be 0" if found.nonfinite else "as it should be"),
        ("round trip", f"{found.certificate.max():.1e}", round_trip),
        *(("bits/dim", f"{p.bits.mean():.3f}", f"{p.name}, &plusmn; {_error(p.bits):.3f}") for p in found.populations),
        ("decoding", f"{per_sample:.3g} ms", "a sample"),
    ]
    items = [
        f"<div><dt>{html.escape(name)}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in rows
    ]
    return f'<dl class="figures">{"".join(items)}</dl>'


def _samples(found: Examination) -> str:
    labels = found.request.classes()
    classes = list(dict.fromkeys(labels.tolist()))
    rows = []
    for label in classes[:_CLASSES]:
        images = found.images[labels == label][:_ROW]
        name = f"class {found.bundle.manifest.class_name(label)}" if label >= 0 else "no label"
        rows.append(_strip(name, images, f"{len(images)} samples, {name}"))
    more = f" {len(classes) - _CLASSES} more classes were drawn." if len(classes) > _CLASSES else ""
    text = f"One row a class, in the order they were drawn; none picked, none left out.{more}"
    if found.nonfinite:
        listed = ", ".join(map(str, found.nonfinite[:10])) + (", ..." if len(found.nonfinite) > 10 else "")
        text += f" Samples {listed} are not finite, and black."
    return _section("Samples", text, _strips(rows))


def _blocks(found: Examination) -> str:
    rows = [_strip(name, _evened(images), f"samples: {name}") for name, images in found.stages]
    text = (
        "The first samples on their way from noise to image: a row shows all of them after one block was inverted. "
        "Each row is scaled to its own contrast."
    )
    return _section("Block by block", text, _strips(rows))


def _latents(found: Examination) -> str:
    c = found.bundle.manifest.config
    side = c.image_size // c.patch_size
    latents = {p.name: p.latent.astype(np.float64) for p in found.populations}
    rows, by_position = [], []
    for name, z in latents.items():
        mean, variance = z.mean((0, 2)), z.var((0, 2))
        kurtosis = np.mean((z - z.mean()) ** 4) / max(z.var() ** 2, 1e-300) - 3
        numbers = (f"{z.mean():+.4f}", f"{z.var():.4f}", f"{kurtosis:+.3f}", f"{np.abs(z).max():.2f}")
        spans = (f"{mean.min():+.3f} to {mean.max():+.3f}", f"{variance.min():.3f} to {variance.max():.3f}")
        rows.append((name, str(len(z)), *numbers, *spans))
        by_position.append((name, (mean, variance - 1)))
    maps = []
    for k, (what, middle) in enumerate((("mean", 0), ("variance", 1))):
        reach = max(0.1, *(float(np.abs(values[k]).max()) for _, values in by_position))
        scale = f"<small>blue {middle - reach:.2f}, clear {middle}, red {middle + reach:.2f}</small>"
        for name, values in by_position:
            picture = plots.heat_map(values[k].reshape(side, side), reach, f"{what} by position, {name}")
            maps.append(f"<figure>{picture}<figcaption>{what}, {name}<br>{scale}</figcaption></figure>")
    names = ("", "images", "mean", "variance", "excess kurtosis", "largest", "mean by position", "variance by position")
    text = (
        "Images encoded by the forward graphs, without guidance. Were the model perfect, latents of real images would "
        "be standard normal at every position: mean 0, variance 1, excess kurtosis 0. Latents of the samples "
        "themselves show the inverse at work and what guidance changed, not how well the model fits"
        + (". " if len(found.populations) > 1 else "; that takes real images, and none were given. ")
    )
    plot = plots.quantiles({name: z.ravel() for name, z in latents.items()}, "Quantiles of latents")
    figures = f'<figure class="plot">{plot}</figure><div class="maps">{"".join(maps)}</div>'
    return _section("Latents", text, _table(names, rows) + figures)


def _likelihood(found: Examination) -> str:
    bits = {p.name: p.bits.astype(np.float64) for p in found.populations}
    plot = plots.histogram(bits, "bits per dimension", "Histogram of bits per dimension")
    text = "Bits per dimension of images with the noise the model was trained with; fewer are likelier. " + (
        "Samples far to the left of the data are smoother than real images; guidance does that."
        if len(bits) > 1
        else "Of the samples alone, since no real images were given."
    )
    return _section("Likelihood", text, f'<figure class="plot">{plot}</figure>')


def _certificates(found: Examination) -> str:
    errors, label = {"samples": found.certificate.astype(np.float64)}, "largest difference from the noise"
    plot = plots.histogram(errors, label, "Histogram of round-trip errors", decades=True)
    text = (
        "Each raw sample encoded again, with the guidance it was drawn with, must give back its noise. The largest "
        f"difference of any number of a sample: median {np.median(found.certificate):.1e}, at most "
        f"{found.certificate.max():.1e}."
    )
    lost = int(np.isinf(found.certificate).sum())
    if lost:
        text += f" For {lost} it is infinite: encoding them overflowed."
    if doubtful := _suspects(found):
        listed = ", ".join(map(str, doubtful[:10])) + (", ..." if len(doubtful) > 10 else "")
        text += f" Above {found.report.suspect_above:g} a round trip is suspect, which is that of samples {listed}."
    return _section("Round trip", text, f'<figure class="plot">{plot}</figure>')


def _times(found: Examination) -> str:
    total = sum(found.block_seconds)
    rows = [
        (f"block {k}", found.block_seconds[k], f"{found.block_seconds[k]:.3g} s, {found.report.passes[k]} passes")
        for k in reversed(range(len(found.block_seconds)))
    ]
    rows.append(("encoding", found.encode_seconds, f"{found.encode_seconds:.3g} s, all blocks"))
    if found.denoise_seconds:
        rows.append(("denoising", found.denoise_seconds, f"{found.denoise_seconds:.3g} s, all blocks"))
    text = (
        f"{found.request.n} samples on {found.report.backend}, decoded: {found.report.decoding}. Blocks are inverted "
        f"from the last to the first, {total:.3g} s in all; a pass is a step that waits for the one before."
    )
    return _section("Time", text, f'<figure class="plot">{plots.bars(rows, "Seconds by block")}</figure>')


def _parity(found: Examination) -> str:
    document = found.bundle.manifest.parity
    if not document:
        return _section("Parity", "This export was not verified against PyTorch.", "")
    try:
        card = Card.from_json(document, MANIFEST)
    except BundleError:
        return _section("Parity", "The card is of another version; the manifest holds it.", "")
    shift = "" if card.bits_per_dim_shift is None else f", shift of bits per dimension {card.bits_per_dim_shift:.1e}"
    text = (
        f"{card.backend} against {card.oracle} when the bundle was exported: {card.method}, {card.samples} samples. "
        f"Certificate {card.certificate:.1e}{shift}."
    )
    rows = [
        (name, f"{row.cosine:.9f}", *(f"{number:.1e}" for number in (row.rms, row.p99, row.max)))
        for name, row in card.rows()
    ]
    return _section("Parity", text, _table(("", "cosine", "rms", "99 %", "largest"), rows))


def _provenance(found: Examination, making: Making) -> str:
    made = [(f"exported with {name}", version) for name, version in found.bundle.manifest.exporter.items()]
    rows = [("bundle", found.bundle.hash), ("backend", found.report.backend), ("date", making.date)]
    rows += [*making.versions.items(), *made]
    items = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    command = f"<p>The same report again:</p><pre>{html.escape(making.command)}</pre>"
    return _section("Where this comes from", "", f'{command}<table class="facts">{items}</table>')


# --- pieces ---------------------------------------------------------------------------------------------------------


def _section(title: str, text: str, body: str) -> str:
    lead = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>\n"


def _strip(name: str, images: Array, alt: str) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{plots.picture(images, alt)}</td></tr>"


def _strips(rows: list[str]) -> str:
    return f'<div class="wide"><table class="strips">{"".join(rows)}</table></div>'


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(_cells(row) for row in rows)
    return f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: tuple[str, ...]) -> str:
    first, *rest = map(html.escape, row)
    return f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"


def _evened(images: Array) -> Array:
    """Images scaled so that nearly all of them fits [-1, 1]."""
    finite = np.abs(images[np.isfinite(images)])
    reach = float(np.quantile(finite, 0.99)) if finite.size else 1.0
    return images / np.float32(max(1.0, reach))


def _suspects(found: Examination) -> list[int]:
    """Finite samples whose round trip is suspect."""
    return [i for i in found.report.suspects if i not in set(found.nonfinite)]


def _error(values: Array) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
