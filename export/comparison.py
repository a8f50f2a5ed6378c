"""A bundle beside PyTorch: both as flows, on the same weights; and its parity card from that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from tarflow.checkpoint import load
from tarflow.config import Hints
from tarflow.model import TarFlow
from tarflow.reference import Twin

from ..quality.card import Card
from ..quality.parity import Others, Pairs, Watch, make_pairs, verify, verify_golden
from ..runtime.bundle import FUSED, MANIFEST, RESIDENT, WEIGHTS, Bundle
from ..runtime.errors import InputError
from ..runtime.flow import Flow
from ..runtime.hub import checkpoint_at
from ..runtime.opening import Opening
from ..runtime.ort.backend import OrtBackend
from ..runtime.ort.library import load_onnxruntime
from ..runtime.providers import native_backends
from .emulate import runnable, widened

ONE_BLOCK = Opening("cpu", memory="least")  # beside the whole model in PyTorch
_CHECKS_LENGTHS = (1, 26)  # the first ONNX Runtime whose attention, on CPUs, writes to no slot that a cache has not


@dataclass(frozen=True, slots=True)
class Beside:
    """A bundle's ``flow``, and the ``oracle``: the same with PyTorch computing every block, on ``model``'s weights.

    ``others`` decode otherwise, as far as they are compared.
    """

    flow: Flow
    oracle: Flow
    model: TarFlow
    others: Others = field(default_factory=Others)

    def card(self, pairs: Pairs, watch: Watch) -> Card:
        return verify(self.flow, self.oracle, pairs, watch, self.others)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare: a bundle, opened as ``opening`` says ("auto": its graphs, on the CPU), with PyTorch on a
    checkpoint.

    ``checkpoint`` None means the bundle's own weights; ``hints`` are what its name does not say.
    """

    folder: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    hints: Hints | None = None
    opening: Opening = ONE_BLOCK

    @contextlib.contextmanager
    def open(self, watch: Watch) -> Iterator[Beside]:
        """Raises InputError if the checkpoint is another model's; what opening either raises."""
        bundle = Bundle.open(self.folder)
        bundle.check()
        bundle.check_graphs()
        watch("load the checkpoint")
        model = open_checkpoint(bundle.folder if self.checkpoint is None else self.checkpoint, self.hints)
        theirs, ours = asdict(model.config), asdict(bundle.manifest.config)
        if theirs != ours:
            wrong = ", ".join(f"{key} {theirs[key]} against {ours[key]}" for key in ours if theirs[key] != ours[key])
            raise InputError(
                f"'{self.checkpoint or 'weights'}' is not the model in '{self.folder}': {wrong}; name the "
                "checkpoint it was exported from",
                field="checkpoint",
            )
        with beside(model, bundle, self.opening.else_on("cpu")) as found:
            yield found


def verify_bundle(comparison: Comparison, watch: Watch = lambda stage: None) -> Card:
    """The parity card of a bundle against PyTorch, its golden pairs too. Raises as :meth:`Comparison.open`."""
    with comparison.open(watch) as found:
        pairs = oracle_pairs(found.model, found.oracle.bundle, watch)
        card = found.card(pairs, watch)
        if not pairs.serial:
            return card
        watch("verify golden pairs")
        return replace(card, golden=verify_golden(found.flow).sample)


@contextlib.contextmanager
def beside(model: TarFlow, bundle: Bundle, opening: Opening = ONE_BLOCK) -> Iterator[Beside]:
    """A bundle as it is opened, beside PyTorch; bfloat16 is emulated on a CPU, which has no product of it."""
    oracle = oracle_flow(model, bundle)
    with torch.no_grad():
        if opening.provider != "cpu":
            yield Beside(Flow.open(bundle, opening), oracle, model)
            return
        with runnable(bundle) as here, _others(bundle, here, opening) as others:
            backend = OrtBackend(here, opening)
            if here is not bundle:
                backend.description += ", bfloat16 emulated by rounding float32"
            yield Beside(Flow(here, backend, budget=backend.budget), oracle, model, others)


@contextlib.contextmanager
def _others(bundle: Bundle, here: Bundle, opening: Opening) -> Iterator[Others]:
    """The native engine, and the graphs for devices that a bundle has, on this CPU; ``here`` is the bundle as it can
    run it.
    """
    graphs, native = bundle.manifest.blocks[0].graphs, native_backends(bundle)
    resident = OrtBackend(here, opening, resident=True) if RESIDENT in graphs else None
    version = tuple(map(int, load_onnxruntime().__version__.split(".")[:2]))
    if resident is None or version < _CHECKS_LENGTHS or not graphs.keys() >= set(FUSED.values()):
        yield Others(resident, native=native)
        return
    with widened(bundle) as wide:
        yield Others(resident, OrtBackend(wide, opening, resident=True, fused=True), native)


def oracle_flow(model: TarFlow, bundle: Bundle) -> Flow:
    """The bundle's flow with PyTorch computing every block, and the checkpoint's prior."""
    return Flow(bundle, Twin(model), model.prior.cpu().numpy())


@torch.no_grad()
def oracle_pairs(model: TarFlow, bundle: Bundle, watch: Watch) -> Pairs:
    """Noises and what PyTorch makes of them."""
    return make_pairs(oracle_flow(model, bundle), sum(p.numel() for p in model.parameters()), watch)


def open_checkpoint(checkpoint: str | os.PathLike[str], hints: Hints | None = None) -> TarFlow:
    """Load a model; if it is a bundle, after checking its weights' hash."""
    path = checkpoint_at(checkpoint)
    if (path / MANIFEST).is_file():
        Bundle.open(path).check(WEIGHTS)
    return load(path, hints)
