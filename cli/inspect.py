"""``tarflow inspect``: what is in a bundle, and what decodes it here. Opens no engine."""

from __future__ import annotations

from dataclasses import asdict

from ..runtime.bundle import MANIFEST, Bundle, ModelShape
from ..runtime.errors import BundleError, Remedy, briefly
from ..runtime.files import size_text
from ..runtime.hub import origin
from ..runtime.native.choice import on_cpus
from .console import emit, identity, show
from .messages import command
from .options import BundleArgument, Json

_NAMED = 10  # classes


def inspect(bundle: BundleArgument, json: Json = False) -> None:
    """Show a bundle's configuration, graphs, precision, sizes and parity card, and check its hashes.

    Example: tarflow inspect tarflow-bundle --json
    """
    from ..quality.card import Card
    from .card import print_card

    bundle.check()
    m = bundle.manifest
    if json:
        emit(
            **identity(bundle), origin=origin(bundle.folder), hashes="ok", decoding_on_cpus=on_cpus(bundle), **asdict(m)
        )
        return
    c = m.config
    show(
        [
            ("name", m.name),
            ("hash", bundle.hash),
            ("precision", m.precision),
            *model_rows(c, m.noise_from, m.class_names),
            ("files", f"{len(m.files) + 1}, {size_text(sum(f.size for f in m.files.values()))}, all hashes match"),
            *((("came from", came),) if (came := origin(bundle.folder)) else ()),
            *((("exported from", m.source),) if m.source else ()),
            ("on CPUs", f"decoded by {on_cpus(bundle)}"),
            ("made with", ", ".join(f"{k} {v}" for k, v in m.exporter.items())),
        ],
        str(bundle.folder),
    )
    print("graphs")
    for k, block in enumerate(m.blocks):
        sizes = ", ".join(f"{kind} {size_text(m.files[block.graphs[kind]].size)}" for kind in block.graphs)
        print(f"  block {k} ({'reversed' if block.reversed else 'in order'}): {sizes}, opset {m.opset}")
    _tell_of_engines(bundle)
    if not m.parity:
        print(f"parity: not verified; run: {command(Remedy('verify', {'bundle': bundle.folder}))}")
        return
    try:
        print_card(Card.from_json(m.parity, str(bundle.folder / MANIFEST)))
    except BundleError as error:
        print(f"parity: {briefly(error)}; see it with --json")


def model_rows(c: ModelShape, noise_from: str, names: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """What a model is, for people: a name and what there is to say, each. ``names`` are its classes'."""
    patches = f"patches of {c.patch_size}: {c.tokens} x {c.patch_dim}"
    noise = f"Gaussian, {c.noise_std:g}" if c.noise_std is not None else "uniform dequantisation"
    more = ", ..." if len(names) > _NAMED else ""
    called = f": {', '.join(names[:_NAMED])}{more}" if names else ""
    return [
        ("images", f"{c.channels} x {c.image_size} x {c.image_size}, {patches}"),
        ("model", f"{c.blocks} blocks x {c.layers} layers, width {c.width}, {c.heads} heads"),
        ("classes", f"{c.classes}{called}" if c.classes else "none"),
        ("kind", "affine (nvp)" if c.nvp else "volume-preserving, learned prior"),
        ("noise", f"{noise}; read off {noise_from}" if noise_from else noise),
    ]


def _tell_of_engines(bundle: Bundle) -> None:
    """A line for each build of TensorRT engines, without loading any."""
    from ..runtime.tensorrt.record import folders
    from ..runtime.tensorrt.record_reader import read_record

    found = folders(bundle)
    if found:
        print("engines")
    for folder in found:
        try:
            record = read_record(folder)
        except BundleError as error:
            print(f"  {folder.name}: {error}")
            continue
        wrong = [] if record.bundle == bundle.hash else ["built from another bundle"]
        if not record.complete(len(bundle.manifest.blocks)):
            wrong.append("not finished")
        engines = record.engines.values()
        worst = max((engine.parity["rms"] for engine in engines if engine.parity), default=None)
        built = "/".join(sorted({engine.built for engine in engines}))
        run = f"rms {worst:.2g} at most" if worst is not None else "not run"
        state = "; ".join([f"{len(engines)} engines, {built} for {record.target}", run, *wrong])
        print(f"  {record.package} {record.version}, batch {record.profiles['step'][0].batch}: {state}")
