"""What is to be built: a bundle's graphs, by the TensorRT that is here, for a target. Nothing is built yet."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime.bundle import RESIDENT, WEIGHTS, Bundle
from ...runtime.ports import Sizes, shapes
from ...runtime.tensorrt.record import FOLDER, Engine, Record
from .options import Options
from .target import find_tensorrt, folder_name, target_of

Shapes = dict[str, tuple[int, ...]]  # of a graph's inputs
GRAPHS = {"step": RESIDENT, "forward": "forward", "gradient": "gradient"}  # what each kind of engine is built from
_ENGINES = {graph: kind for kind, graph in GRAPHS.items()}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A build of a bundle's engines by ``trt``, TensorRT's module. ``record`` holds no engines."""

    bundle: Bundle
    options: Options
    trt: Any
    record: Record

    @classmethod
    def of(cls, bundle: Bundle, options: Options) -> Blueprint:
        """The blueprint for this machine. Raises InputError for sizes and devices that cannot be, MachineError without
        TensorRT or, where one is needed, a GPU.
        """
        trt, package = find_tensorrt()
        options.check(bundle)
        record = Record(
            bundle=bundle.hash,
            precision=bundle.manifest.precision,
            package=package,
            version=trt.__version__,
            target=target_of(trt, package, options.device),
            profiles=options.profiles(bundle.manifest.config),
            level=options.level,
        )
        return cls(bundle, options, trt, record)

    @property
    def folder(self) -> Path:
        """Where the engines go: a folder for each target, TensorRT and precision."""
        return self.bundle.own(FOLDER) / folder_name(self.record)

    def engines(self) -> dict[str, Engine]:
        """Every engine to build, by file name, its hash and all that is found out about it left empty."""
        precision, found = self.record.precision, {}
        for block, entry in enumerate(self.bundle.manifest.blocks):
            for kind, source in GRAPHS.items():
                graph = entry.graphs[source]
                engine = Engine(block, kind, graph, self.key(kind, graph), "", 0, 0.0, precision, "", "")
                found[f"block_{block:02d}.{kind}.engine"] = engine
        return found

    def key(self, kind: str, graph: str) -> str:
        """SHA-256 over everything an engine depends on; the timing cache only changes how long it takes."""
        files = self.bundle.manifest.files
        parts = {
            "graph": files[graph].sha256,
            "weights": files[WEIGHTS].sha256,
            "profiles": [asdict(profile) for profile in self.record.profiles[kind]],
            "tensorrt": [self.record.package, self.record.version],
            "target": asdict(self.record.target),
            "flags": [False, False, self.record.level],  # two are no more; engines from before keep their keys
            "precision": self.record.precision,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def shapes(self, graph: str) -> list[list[Shapes]]:
        """Least, best and most of a kind of graph's input shapes, for every profile of its engine.

        The host's step graph, of which no engine is made, is asked about likewise: its cache grows from step to step.
        """
        config = self.bundle.manifest.config
        slots = 1, max(1, config.tokens // 2), config.tokens
        return [
            [
                shapes(config, graph, Sizes(batch, profile.branches, window, filled))
                for batch, window, filled in zip(profile.batch, profile.window, slots, strict=True)
            ]
            for profile in self.record.profiles[_ENGINES.get(graph, graph)]
        ]
