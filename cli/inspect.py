"""``tarflow inspect``: what is in a bundle. Needs no engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..runtime.files import size_text
from .console import default_bundle, emit, show
from .options import BundleArgument, Json

if TYPE_CHECKING:
    from ..runtime.bundle import Bundle


def inspect(bundle: BundleArgument = None, json: Json = False) -> None:
    """Show a bundle's configuration, graphs, precision, sizes and parity card, and check its hashes.

    Example: tarflow inspect tarflow-bundle --json
    """
    from ..quality.card import Card
    from ..runtime.bundle import MANIFEST, Bundle
    from ..runtime.errors import BundleError, Remedy, briefly
    from .card import print_card
    from .messages import command

    opened = Bundle.open(default_bundle(bundle))
    opened.check()
    m = opened.manifest
    if json:
        emit({"bundle": str(opened.folder), "bundle_hash": opened.hash, "hashes": "ok", **asdict(m)})
        return
    c = m.config
    noise = f"Gaussian, {c.noise_std:g}" if c.noise_std is not None else "uniform dequantisation"
    show(
        [
            ("name", m.name),
            ("hash", opened.hash),
            ("precision", m.precision),
            (
                "images",
                f"{c.channels} x {c.image_size} x {c.image_size}, patches of {c.patch_size}: {c.tokens} x "
                f"{c.patch_dim}",
            ),
            ("model", f"{c.blocks} blocks x {c.layers} layers, width {c.width}, {c.heads} heads"),
            ("classes", str(c.classes) if c.classes else "none"),
            ("kind", "affine (nvp)" if c.nvp else "volume-preserving, learned prior"),
            ("noise", noise),
            ("files", f"{len(m.files)}, {size_text(sum(f.size for f in m.files.values()))}, all hashes match"),
            ("made with", ", ".join(f"{k} {v}" for k, v in m.exporter.items())),
        ],
        str(opened.folder),
    )
    print("graphs")
    for k, block in enumerate(m.blocks):
        sizes = ", ".join(f"{kind} {size_text(m.files[block.graphs[kind]].size)}" for kind in block.graphs)
        print(f"  block {k} ({'reversed' if block.reversed else 'in order'}): {sizes}, opset {m.opset}")
    for line in _engines(opened):
        print(line)
    if not m.parity:
        print(f"parity: not verified; run: {command(Remedy('verify', {'bundle': opened.folder}))}")
        return
    try:
        print_card(Card.from_json(m.parity, str(opened.folder / MANIFEST)))
    except BundleError as error:
        print(f"parity: {briefly(error)}; see it with --json")


def _engines(bundle: Bundle) -> list[str]:
    """A line for each build of TensorRT engines, without loading any."""
    from ..runtime.errors import BundleError
    from ..runtime.tensorrt.record import folders
    from ..runtime.tensorrt.record_reader import read_record

    lines = []
    for folder in folders(bundle):
        try:
            record = read_record(folder)
        except BundleError as error:
            lines.append(f"  {folder.name}: {error}")
            continue
        wrong = [] if record.bundle == bundle.hash else ["built from another bundle"]
        if not record.complete(len(bundle.manifest.blocks)):
            wrong.append("not finished")
        engines = record.engines.values()
        worst = max((engine.parity["rms"] for engine in engines if engine.parity), default=None)
        built = "/".join(sorted({engine.built for engine in engines}))
        run = f"rms {worst:.2g} at most" if worst is not None else "not run"
        state = "; ".join([f"{len(engines)} engines, {built} for {record.target}", run, *wrong])
        lines.append(f"  {record.package} {record.version}, batch {record.profiles['step'][0].batch}: {state}")
    return ["engines", *lines] if lines else []
