"""From a checkpoint to a bundle. The manifest is written last: a bundle is whole or absent."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from safetensors.numpy import save

from tarflow.class_names import class_names_of
from tarflow.config import Hints
from tarflow.model import TarFlow

from ..quality.card import Card
from ..quality.parity import Pairs, Watch
from ..runtime.bundle import FUSED, GOLDEN, MANIFEST, PARITY, RESIDENT, WEIGHTS, BlockEntry, Bundle, FileEntry, Manifest
from ..runtime.errors import CheckFailed, Remedy
from ..runtime.files import check_replaceable, check_room, replacing_folder, sha256
from ..runtime.hub import checkpoint_at, origin
from ..runtime.ort.library import check_path
from ..runtime.precision import PRECISIONS, Precision
from .card import markdown
from .comparison import beside, open_checkpoint, oracle_pairs
from .fused import fits, fuse
from .graphs import BlockGraph
from .precision import precision_named, torch_type, typed
from .quantise import chosen, sensitivities
from .trace import DIRECTED, KINDS, OPSET, place, reverse, shape_of, trace
from .weights import check_weights, rename, weights_size, write_weights


def export(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    engine: str = "fp32",
    hints: Hints | None = None,
    force: bool = False,
    check: bool = True,
    watch: Watch = lambda stage: None,
) -> Bundle:
    """Export a checkpoint to a bundle at ``folder``: per block a step, a forward, a gradient and a resident graph, and
    in fp16 two fused ones.

    ``check`` verifies the bundle against PyTorch before it appears. Raises CheckFailed, and leaves no bundle, if it
    is out of the precision's tolerance; InputError if ``folder`` exists and not ``force``; what ``load`` raises.
    """
    precision = precision_named(engine)
    check_replaceable(folder, force)
    if check:
        check_path(folder)
    watch(f"load {checkpoint}")
    checkpoint = checkpoint_at(checkpoint)
    model = open_checkpoint(checkpoint, hints)
    check_weights(model, precision)
    names = class_names_of(checkpoint, model.config.classes, hints)
    check_room(folder, weights_size(model, precision))
    with replacing_folder(folder, force) as partial:
        unwritten = Bundle(partial, _manifest(model, checkpoint, precision, names), "")
        pairs = oracle_pairs(model, unwritten, watch)
        (partial / GOLDEN).write_bytes(save(pairs.tensors()))
        int8: frozenset[str] = frozenset()
        if precision.int8:
            watch("measure what int8 does to each layer")
            int8 = chosen(sensitivities(model, pairs.states[:0:-1], pairs.labels))
        watch(f"write {WEIGHTS}")
        stored = write_weights(model, precision, partial / WEIGHTS, int8)
        written = replace(unwritten.manifest, blocks=_graphs(model, precision, stored, partial, watch))
        card = _card(model, Bundle(partial, written, ""), pairs, watch) if check else None
        _finish(written, card, partial)
    return Bundle.open(folder)


def graph_name(block: int, kind: str) -> str:
    return f"block_{block:02d}.{kind}.onnx"


def bundle_name(checkpoint: str | os.PathLike[str]) -> str:
    """The data set's name from 'imagenet_model_2_768_8_8_0.05.pth', a bundle's own name, or the file's."""
    path = Path(checkpoint)
    if (path / MANIFEST).is_file():
        return Bundle.open(path).manifest.name
    return re.sub(r"_model_.*$", "", path.stem).encode(errors="backslashreplace").decode()  # a manifest is UTF-8


def _graphs(
    model: TarFlow, precision: Precision, stored: Mapping[str, ir.ExternalTensor], folder: Path, watch: Watch
) -> tuple[BlockEntry, ...]:
    """Trace each kind once, or once for each direction; blocks of one direction differ in nothing but their weights."""
    graphs: dict[str, ir.Model] = {}
    for parity in range(min(2, model.config.blocks)):
        first = typed(model.blocks[parity], precision)
        for kind in KINDS if parity == 0 else DIRECTED:
            watch(f"trace {kind}" + (", reversed" if parity else ", in order") * (kind in DIRECTED))
            graphs[kind] = trace(kind, first, torch_type(precision))
        if parity == 1:
            graphs[RESIDENT] = reverse(graphs[RESIDENT], model.config.tokens)
        if precision.fused and fits(shape_of(model.config)):
            graphs |= {kind: fuse(first, branches) for branches, kind in FUSED.items()}
        for k in range(parity, model.config.blocks, 2):
            for kind, graph in graphs.items():
                place(graph, k, stored, rename(BlockGraph(first), k), folder / graph_name(k, kind))
    return tuple(
        BlockEntry(model.blocks[k].reversed, {kind: graph_name(k, kind) for kind in graphs})
        for k in range(model.config.blocks)
    )


def _card(model: TarFlow, bundle: Bundle, pairs: Pairs, watch: Watch) -> Card:
    """Compare the graphs just written with PyTorch. Raises CheckFailed if they are out of tolerance."""
    with beside(model, bundle) as found:
        card = found.card(pairs, watch)
    wrong = card.failures()
    if wrong:
        wider = PRECISIONS[bundle.manifest.precision].wider
        raise CheckFailed(
            "the exported graphs are not within tolerance of PyTorch, and no bundle was left:\n  "
            + "\n  ".join(wrong)
            + f"\nTry `engine` {wider}; or look closer: export it without verification (`check`), then bisect it",
            field="engine",
            remedy=Remedy("bisect"),
        )
    return card


def _finish(manifest: Manifest, card: Card | None, folder: Path) -> None:
    """Write the card, then the manifest with every other file's hash."""
    (folder / PARITY).write_text(markdown(manifest, card))
    names = sorted(path.name for path in folder.iterdir())
    files = {name: FileEntry(sha256(folder / name), (folder / name).stat().st_size) for name in names}
    whole = replace(manifest, files=files, parity={} if card is None else card.to_json())
    (folder / MANIFEST).write_text(whole.to_json())


def _manifest(
    model: TarFlow, checkpoint: str | os.PathLike[str], precision: Precision, names: tuple[str, ...]
) -> Manifest:
    """Without graphs and files, which are yet to be written."""
    return Manifest(
        name=bundle_name(checkpoint),
        precision=precision.name,
        config=shape_of(model.config),
        blocks=(),
        files={},
        opset=OPSET,
        exporter={package: _version(package) for package in ("tarflow", "torch", "onnx", "onnxruntime")},
        class_names=names,
        noise_from=model.noise_from,
        source=source_of(Path(checkpoint)),
    )


def source_of(checkpoint: Path) -> str | None:
    """Where on the hub a checkpoint lay, and in which commit; of a bundle, where what it was made of lay."""
    within = Bundle.open(checkpoint).manifest.source if (checkpoint / MANIFEST).is_file() else None
    return within or origin(checkpoint)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
