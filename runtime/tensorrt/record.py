"""The record of built engines: what a folder of them was built from, for which machine, and what was checked.

``BUNDLE/engines/<gpu>-<tensorrt>-<precision>/engines.json``; FORMAT.md is the normative text. An engine is native code:
its SHA-256 is compared with the record before anything deserialises it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..document import write_document
from ..errors import BundleError, Remedy

FORMAT = "tarflow-engines"
SCHEMA = 1
FOLDER = "engines"
RECORD = "engines.json"
ENGINE_KINDS = ("step", "forward", "gradient")
GONE = ("version_compatible", "strip_weights")  # ways to build that are no more: in every record, always false
PACKAGES = ("tensorrt", "tensorrt_rtx")  # modules that build and run engines

Range = tuple[int, int, int]  # least, best, most


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes an engine is built for, each (least, best, most); ``branches`` is 1, or 2 under guidance."""

    branches: int
    batch: Range
    window: Range = (1, 1, 1)

    def holds(self, branches: int, window: int) -> bool:
        return self.branches == branches and self.window[0] <= window <= self.window[2]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine file: of which graph, its hash, and what was found out about it.

    ``built`` is the precision read back, ``attested`` where it was read from: "engine" or "network".
    ``parity`` is what this very file computed, against ONNX Runtime; None if it has not run.
    """

    block: int
    kind: str
    graph: str
    key: str
    sha256: str
    size: int
    seconds: float
    asked: str
    built: str
    attested: str
    parity: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where engines run: a GPU's name, None for any with one of these compute capabilities, such as "8.6"."""

    gpu: str | None
    capabilities: tuple[str, ...]

    def for_machine(self, here: Here | None) -> tuple[str, ...]:
        """Capabilities to build for so that the engines run here too; TensorRT builds for the GPU at hand alone."""
        if here is None or here.capability in self.capabilities:
            return self.capabilities
        return (*self.capabilities, here.capability) if here.package == "tensorrt_rtx" else (here.capability,)

    def __str__(self) -> str:
        return f"{self.gpu or 'any GPU'} (compute capability {', '.join(self.capabilities)})"


@dataclass(frozen=True, slots=True)
class Here:
    """What a machine has: TensorRT's package and version, the GPU's name and compute capability."""

    package: str
    version: str
    gpu: str
    capability: str


@dataclass(frozen=True, slots=True)
class Record:
    """All engines of one build. Immutable; :func:`read_record` and :meth:`write` are inverses."""

    bundle: str  # SHA-256 of the bundle's manifest
    precision: str
    package: str
    version: str
    target: Target
    profiles: Mapping[str, tuple[Profile, ...]]
    engines: Mapping[str, Engine] = field(default_factory=dict)
    level: int | None = None

    def write(self, folder: Path) -> None:
        """Write ``engines.json``, whole or not at all."""
        document = {"format": FORMAT, "schema": SCHEMA, **asdict(self), **dict.fromkeys(GONE, False)}
        write_document(folder / RECORD, document)

    @property
    def largest_batch(self) -> int:
        """Images one decoding can take, guided or not."""
        return min(profile.batch[2] for profile in self.profiles["step"])

    def complete(self, blocks: int) -> bool:
        made = {(engine.block, engine.kind) for engine in self.engines.values()}
        return made >= {(block, kind) for block in range(blocks) for kind in ENGINE_KINDS}

    def _strange_graph(self, bundle: Bundle) -> str | None:
        """What is wrong with the first graph named that is none of its block's; None if all are the bundle's."""
        blocks, files = bundle.manifest.blocks, bundle.manifest.files
        gone = files.keys() - {graph for block in blocks for graph in block.graphs.values()}
        for engine in self.engines.values():
            if engine.graph in gone:
                return f"they were built from '{engine.graph}', a kind of graph that is no more"
            if engine.block >= len(blocks) or engine.graph not in blocks[engine.block].graphs.values():
                return "they name graphs that this bundle does not have"
        return None

    def misfits(self, bundle: Bundle, here: Here) -> list[str]:
        """Why these engines cannot run here: what was found and what is here; empty if they can."""
        wrong = []
        if self.bundle != bundle.hash:
            wrong.append(f"they were built from another bundle ({self.bundle[:12]}, this one is {bundle.hash[:12]})")
        elif not self.complete(len(bundle.manifest.blocks)):
            wrong.append("the build was not finished")
        elif strange := self._strange_graph(bundle):
            wrong.append(strange)
        if self.package != here.package:
            wrong.append(f"they need {self.package} {self.version}, here is {here.package} {here.version}")
        elif self.version != here.version:
            wrong.append(f"they need {self.package} {self.version} exactly, here is {here.version}")
        if here.capability not in self.target.capabilities:
            wrong.append(f"they are for {self.target}, here is {here.gpu} ({here.capability})")
        elif self.target.gpu not in (None, here.gpu):
            wrong.append(f"they are tuned for {self.target.gpu}, here is {here.gpu}")
        return wrong

    def read(self, folder: Path, name: str) -> bytes:
        """The content of an engine, its hash checked. Raises BundleError for one that is missing or was changed."""
        path, engine, again = folder / name, self.engines[name], self.rebuild(folder.parent.parent)
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"'{path}' is missing or no regular file; build the engines again", remedy=again)
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()  # of the bytes that will be loaded, not of a second reading
        if found != engine.sha256:
            raise BundleError(
                f"'{path}' was changed after it was built: its SHA-256 is {found[:16]}..., the record says "
                f"{engine.sha256[:16]}... It was not loaded; build the engines again",
                remedy=again,
            )
        return content

    def rebuild(self, bundle: Path, here: Here | None = None, **sizes: Range) -> Remedy:
        """Building engines like these for the machine it is done on, which ``here`` describes.

        ``sizes`` are the batch and the window they should have been built with, if that is what is wrong.
        """
        steps = self.profiles["step"]
        wanted: dict[str, Any] = {"bundle": bundle, "engine": self.precision, "batch": steps[0].batch}
        wanted |= {"window": steps[-1].window, **sizes}
        if wanted["window"][2] == 1:
            del wanted["window"]
        if self.target.gpu is None:
            wanted["device"] = self.target.for_machine(here)
        return Remedy("build", wanted if self.level is None else wanted | {"level": self.level})


def folders(bundle: Bundle) -> list[Path]:
    """Folders that hold a record, in the order of their names."""
    return sorted(path.parent for path in (bundle.folder / FOLDER).glob(f"*/{RECORD}"))
