"""From a checkpoint to a bundle. The manifest is written last: a bundle is whole or absent."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from tarflow.checkpoint import load
from tarflow.config import Config, Hints
from tarflow.model import TarFlow
from tarflow.reference import Twin

from ..quality import parity as verify
from ..runtime.backend import Backend, open_backend
from ..runtime.bundle import GOLDEN, MANIFEST, PARITY, WEIGHTS, BlockEntry, Bundle, FileEntry, Manifest, ModelShape
from ..runtime.errors import CheckFailed, InputError
from ..runtime.files import check_replaceable, replacing_folder, sha256
from ..runtime.flow import Flow
from ..runtime.memory import Budget
from ..runtime.ort.backend import PROVIDERS, OrtBackend
from .bisect import Finding, bisect
from .card import markdown
from .emulate import runnable
from .graphs import BlockGraph
from .precision import PRECISIONS, Precision, typed
from .quantise import chosen, sensitivities
from .trace import DIRECTED, KINDS, OPSET, Stored, pingpong, place, reverse, trace
from .weights import check_weights, rename, weights_size, write_weights

Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an export will write and take. Sizes in bytes; the time is an estimate for a two-core machine."""

    name: str
    config: Config
    precision: str
    files: dict[str, int]
    peak_memory: int
    seconds: float


def export(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    engine: str = "fp32",
    hints: Hints | None = None,
    force: bool = False,
    check: bool = True,
    watch: Watch = lambda stage: None,
) -> Bundle:
    """Export a checkpoint to a bundle at ``folder``: per block a step, a forward and a gradient graph.

    ``check`` verifies the bundle against PyTorch before it appears. Raises CheckFailed, and leaves no bundle, if it
    is out of the precision's tolerance; InputError if ``folder`` exists and not ``force``; what ``load`` raises.
    """
    precision = precision_named(engine)
    check_replaceable(folder, force)
    watch(f"load {checkpoint}")
    model = open_checkpoint(checkpoint, hints)
    check_weights(model, precision)
    with replacing_folder(folder, force) as partial:
        manifest = _manifest(model, checkpoint, precision)
        pairs = _pairs(model, manifest, partial, watch)
        int8 = _int8(model, pairs, watch) if precision.int8 else frozenset()
        watch(f"write {WEIGHTS}")
        stored = write_weights(model, precision, partial / WEIGHTS, int8)
        manifest = replace(manifest, blocks=_graphs(model, precision, stored, partial, watch))
        card = _parity(model, manifest, pairs, partial, watch) if check else {}
        _finish(replace(manifest, parity=card), partial)
    return Bundle.open(folder)


def plan(checkpoint: str | os.PathLike[str], engine: str = "fp32", hints: Hints | None = None) -> Plan:
    """What :func:`export` would do, without doing it."""
    precision = precision_named(engine)
    model = open_checkpoint(checkpoint, hints)
    config, weights = model.config, weights_size(model, precision)
    sizes = {
        "step": (5, 5),
        "forward": (6, 4),
        "gradient": (6, 8),
        "resident": (8, 5),
        "pingpong": (9, 9),
    }  # KiB: per graph, per layer, measured
    mask = config.tokens**2 if config.tokens <= 512 else 0  # larger ones the exporter leaves to be computed
    files = {WEIGHTS: weights + 4096, GOLDEN: verify.SAMPLES * config.tokens * config.patch_dim * 12 + 400}
    for k in range(config.blocks):
        for kind, (fixed, per_layer) in sizes.items():
            files[_graph_name(k, kind)] = (fixed + per_layer * config.layers) * 1024 + (kind != "step") * mask
    files |= {MANIFEST: 2048 + 400 * config.blocks * len(sizes), PARITY: 1024 + 100 * config.blocks}
    full = sum(p.numel() * 4 for p in model.parameters())
    return Plan(
        name=_name(checkpoint),
        config=config,
        precision=precision.name,
        files=files,
        peak_memory=int(full * (1 + 3 / config.blocks) + (700 << 20)),
        seconds=10 + (1 + min(config.blocks, 2)) * (3 + 2 * config.layers) + 5e-8 * full,
    )


def precision_named(engine: str) -> Precision:
    """Raises InputError for a precision that is not one of ours."""
    if engine not in PRECISIONS:
        raise InputError(f"engine '{engine}' is unknown; expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[engine]


def open_checkpoint(checkpoint: str | os.PathLike[str], hints: Hints | None = None) -> TarFlow:
    """Load a model; if it is a bundle, after checking its weights' hash."""
    if (Path(checkpoint) / MANIFEST).is_file():
        Bundle.open(checkpoint).check(WEIGHTS)
    return load(checkpoint, hints)


def verify_bundle(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    hints: Hints | None = None,
    provider: str = "cpu",
    watch: Watch = lambda stage: None,
) -> dict[str, Any]:
    """The parity card of a bundle against PyTorch on ``checkpoint`` (None: on its own weights), and its golden pairs.

    Raises InputError if the checkpoint is another model's; what opening either raises.
    """
    with _beside_pytorch(folder, checkpoint, hints, provider, watch) as (flow, oracle, model):
        pairs = verify.make_pairs(oracle, _parameters(model), watch)
        card = verify.verify(flow, oracle, pairs, watch, _resident(flow.bundle) if provider == "cpu" else None)
        if pairs.serial:
            watch("verify golden pairs")
            card["golden"] = verify.verify_golden(flow)["sample"]
        card["backend"] += _emulation(flow.bundle.manifest) if provider == "cpu" else ""
        return card


def bisect_bundle(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    hints: Hints | None = None,
    provider: str = "cpu",
    tolerance: float | None = None,
    watch: Watch = lambda stage: None,
) -> tuple[Finding, dict[str, Any]] | None:
    """Where a bundle leaves PyTorch, and the tensors that show it; None if nowhere. Raises as :func:`verify_bundle`."""
    if provider not in PROVIDERS:
        raise InputError(
            f"bisect looks inside ONNX graphs, which provider '{provider}' does not run; expected one of "
            + ", ".join(PROVIDERS)
        )
    with _beside_pytorch(folder, checkpoint, hints, provider, watch) as (flow, oracle, model):
        pairs = verify.make_pairs(oracle, _parameters(model), watch)
        return bisect(flow, oracle, model, pairs, tolerance, watch)


@contextlib.contextmanager
def _beside_pytorch(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    hints: Hints | None,
    provider: str,
    watch: Watch,
) -> Iterator[tuple[Flow, Flow, TarFlow]]:
    """A bundle's flow, and the oracle's: the same bundle with PyTorch computing, on a checkpoint's weights."""
    bundle = Bundle.open(folder)
    bundle.check()
    watch("load the checkpoint")
    model = open_checkpoint(checkpoint if checkpoint is not None else folder, hints)
    if ModelShape(**asdict(model.config)) != bundle.manifest.config:
        theirs, ours = asdict(model.config), asdict(bundle.manifest.config)
        differing = ", ".join(f"{key} {theirs[key]} against {ours[key]}" for key in ours if theirs[key] != ours[key])
        raise InputError(
            f"'{checkpoint or 'weights'}' is not the model in '{folder}': {differing}; "
            "name the checkpoint it was exported from"
        )
    with torch.no_grad(), runnable(bundle) if provider == "cpu" else contextlib.nullcontext(bundle) as here:
        backend = (
            OrtBackend(here, budget=Budget(low_memory=True)) if here is not bundle else open_backend(provider, bundle)
        )
        yield Flow(here, backend), twin_flow(model, bundle), model


def twin_flow(model: TarFlow, bundle: Bundle) -> Flow:
    """The oracle: the bundle's flow with PyTorch computing every block, and the checkpoint's prior."""
    return Flow(bundle, Twin(model), model.prior.cpu().numpy())


def _int8(model: TarFlow, pairs: verify.Pairs, watch: Watch) -> frozenset[str]:
    """Weights to store as int8, by what each of them alone does to the golden pairs."""
    watch("measure what int8 does to each layer")
    return chosen(sensitivities(model, pairs.states[:0:-1], pairs.labels))


def _graphs(
    model: TarFlow, precision: Precision, stored: dict[str, Stored], folder: Path, watch: Watch
) -> tuple[BlockEntry, ...]:
    """Trace each kind once, or once for each direction; blocks of one direction differ in nothing but their weights."""
    graphs: dict[str, ir.Model] = {}
    for parity in range(min(2, model.config.blocks)):
        first = typed(model.blocks[parity], precision)
        for kind in KINDS if parity == 0 else DIRECTED:
            watch(f"trace {kind}" + (", reversed" if parity else ", in order") * (kind in DIRECTED))
            graphs[kind] = trace(kind, first, precision.dtype)
        if parity == 1:
            graphs["resident"] = reverse(graphs["resident"], model.config.tokens)
        graphs["pingpong"] = pingpong(graphs["resident"])
        for k in range(parity, model.config.blocks, 2):
            for kind, graph in graphs.items():
                place(graph, k, stored, rename(BlockGraph(first), k), folder / _graph_name(k, kind))
    return tuple(
        BlockEntry(model.blocks[k].reversed, {kind: _graph_name(k, kind) for kind in (*KINDS, "pingpong")})
        for k in range(model.config.blocks)
    )


def _pairs(model: TarFlow, manifest: Manifest, folder: Path, watch: Watch) -> verify.Pairs:
    """Make golden pairs with PyTorch, and write them."""
    from safetensors.numpy import save

    with torch.no_grad():
        pairs = verify.make_pairs(twin_flow(model, Bundle(folder, manifest, "")), _parameters(model), watch)
    (folder / GOLDEN).write_bytes(save(pairs.tensors()))
    return pairs


def _parity(model: TarFlow, manifest: Manifest, pairs: verify.Pairs, folder: Path, watch: Watch) -> dict[str, Any]:
    """Compare the graphs just written with PyTorch."""
    with torch.no_grad():
        oracle = twin_flow(model, Bundle(folder, manifest, ""))
        with runnable(Bundle(folder, manifest, "")) as bundle:
            flow = Flow(bundle, OrtBackend(bundle, budget=Budget(low_memory=True)))
            card = verify.verify(flow, oracle, pairs, watch, _resident(bundle))
            card["backend"] += _emulation(manifest)
    wrong = verify.failures(card)
    if wrong:
        wider = {"fp16": "bf16 or fp32", "int8": "fp16 or fp32"}.get(manifest.precision, "fp32")
        raise CheckFailed(
            "the exported graphs are not within tolerance of PyTorch, and no bundle was left:\n  "
            + "\n  ".join(wrong)
            + f"\nTry --engine {wider}; or look closer: tarflow export --no-verify, then tarflow bisect"
        )
    return card


def _resident(bundle: Bundle) -> Backend | None:
    """What runs a bundle's resident graphs on this machine's CPU; None for a bundle that has none."""
    if not bundle.manifest.blocks[0].has("resident"):
        return None
    return OrtBackend(bundle, budget=Budget(low_memory=True), resident=True)


def _emulation(manifest: Manifest) -> str:
    return ", bfloat16 emulated by rounding float32" if manifest.precision == "bf16" else ""


def _parameters(model: TarFlow) -> int:
    return sum(p.numel() for p in model.parameters())


def _finish(manifest: Manifest, folder: Path) -> None:
    """Write the card, then the manifest with every other file's hash."""
    (folder / PARITY).write_text(markdown(manifest))
    names = sorted(path.name for path in folder.iterdir())
    files = {name: FileEntry(sha256(folder / name), (folder / name).stat().st_size) for name in names}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())


def _manifest(model: TarFlow, checkpoint: str | os.PathLike[str], precision: Precision) -> Manifest:
    """Without graphs and files, which are yet to be written."""
    packages = ("tarflow", "torch", "onnx", "onnxruntime")
    return Manifest(
        name=_name(checkpoint),
        precision=precision.name,
        config=ModelShape(**asdict(model.config)),
        blocks=(),
        files={},
        opset=OPSET,
        exporter={package: _version(package) for package in packages},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _name(checkpoint: str | os.PathLike[str]) -> str:
    """The data set's name from 'imagenet_model_2_768_8_8_0.05.pth', a bundle's own name, or the file's."""
    path = Path(checkpoint)
    if (path / MANIFEST).is_file():
        return Bundle.open(path).manifest.name
    return re.sub(r"_model_.*$", "", path.stem)


def _graph_name(block: int, kind: str) -> str:
    return f"block_{block:02d}.{kind}.onnx"
