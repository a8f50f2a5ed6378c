"""Of what one captured step is made, in graphs for ONNX Runtime's CUDA provider, for a model of any size at no cost:

    python -m bench.gpu.standin --log FILE -- python -m bench.gpu.standin.nodes [BUNDLE]

A line of JSON for each shape of a batch. Without a bundle those of a published shape are written for it, its weights a
hole in a file: no kernel runs that would read them. With one, its resident graphs are counted first.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from bench.gpu.standin.audit import PLACED, Session
from bench.gpu.standin.log import bad, note, part, read
from tarflow.config import Config
from tarflow.export.fused import fuse
from tarflow.export.graphs import BlockGraph
from tarflow.export.precision import typed
from tarflow.export.trace import OPSET, place, shape_of
from tarflow.model import Block
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import FUSED, RESIDENT, WEIGHTS, BlockEntry, Bundle, FileEntry, Manifest
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.precision import PRECISIONS

LARGE = Config(64, 3, 4, width=1024, blocks=1, layers=8, classes=1000, noise_std=0.05)  # a published shape
SHAPES = ((1, 1), (32, 1), (1, 2), (32, 2))  # images and guidance branches
_TYPES = {torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}


def hollow(config: Config, folder: Path) -> Bundle:
    """A bundle of one block in fp16, with no more of it than steps on CUDA read."""
    with torch.device("meta"):
        block = typed(Block(config, 0), PRECISIONS["fp16"])
        tensors = BlockGraph(block).state_dict()
    stored, end = {}, 4096
    for name, tensor in tensors.items():
        size, shape = tensor.numel() * tensor.dtype.itemsize, ir.Shape(tensor.shape)
        kind = _TYPES[tensor.dtype]
        stored[name] = ir.ExternalTensor(WEIGHTS, end, size, kind, shape=shape, name=name, base_dir=folder)
        end += size
    with (folder / WEIGHTS).open("wb") as file:
        file.truncate(end)
    graphs = {fused: f"block_00.{fused}.onnx" for fused in FUSED.values()}
    for branches, fused in FUSED.items():
        place(fuse(block, branches), 0, stored, {name: name for name in tensors}, folder / graphs[fused])
    unused = folder / "block_00.unused.onnx"  # a backend opens a forward graph; steps of one position no resident one
    shutil.copy(folder / graphs[FUSED[1]], unused)
    graphs |= dict.fromkeys(("step", "forward", "gradient", RESIDENT), unused.name)
    files = {path.name: FileEntry("", path.stat().st_size) for path in folder.iterdir()}
    manifest = Manifest("hollow", "fp16", shape_of(config), (BlockEntry(False, graphs),), files, OPSET, {})
    return Bundle(folder, manifest, "")


def of_a_step(backend: OrtBackend, images: int, branches: int) -> dict[str, Any]:
    """Nodes of a captured step, by what they are; what CUDA would not have let happen; where the graph's nodes went."""
    config, graph = backend.config, f"block_00.{FUSED[branches] if backend.fused else RESIDENT}"
    title = f"{graph}-{images}-{branches}"
    labels = np.zeros((branches, images), np.int64)
    mix = np.full((2, branches, config.tokens), 1 / branches, np.float32)
    z = np.zeros((images, config.tokens, config.patch_dim), np.float32)
    decoding = backend.decoding(0, z, Branches(labels, mix, np.ones(branches, np.float32)))
    note(title)
    decoding.step(0)
    note("end")
    events = part(read(), title)
    made = Counter(event.values.get("name", event.call) for event in events if event.captured)
    return {
        "graph": graph,
        "images": images,
        "branches": branches,
        "nodes": sum(made.values()),
        "bad": dict(bad(events)),
        **{key: PLACED[graph][key] for key in ("on the CPU", "copies")},
        "by kernel": dict(made.most_common()),
    }


def main() -> None:
    onnxruntime.InferenceSession = Session
    with tempfile.TemporaryDirectory() as place:
        given = [Bundle.open(folder) for folder in sys.argv[1:]]
        for bundle in given or [hollow(LARGE, Path(place))]:
            for fused in (False, True) if given else (True,):
                backend = OrtBackend(bundle, Opening("cuda"), fused=fused)
                for images, branches in SHAPES:
                    print(json.dumps(of_a_step(backend, images, branches)), flush=True)


if __name__ == "__main__":
    main()
