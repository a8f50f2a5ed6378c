"""What TensorRT-RTX makes of a step, as far as that shows without a GPU:

    python -m bench.gpu.plan BUNDLE [--device 8.9 12.0] [--batch 8]

Layers of the parsed network by the type of what they make, then the kernels that a step launches, unguided and guided:
the plan holds its program as text. How a kernel is compiled, and how long it takes, a GPU decides. A line of JSON for
each compute capability.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tarflow.export.engines.blueprint import GRAPHS, Blueprint
from tarflow.export.engines.network import Parsed, builder_config
from tarflow.export.engines.options import Options
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError, MachineError

# A program for each profile; behind it, the one that computes shapes on the host.
_PROGRAM = re.compile(rb"\nmain \{\n label \w+: \n(.*?)\nshape_main \{", re.DOTALL)
_LAUNCH = re.compile(rb"^  (function|runtime_fusion|fully_connected)=\{ name=\"?(\w+)", re.MULTILINE)
_CACHE_COPY = re.compile(rb"^  function=\{ name=__myl_\w*Move .*?input_args=\{ \"(?:key|value)_\d+_next", re.MULTILINE)


def layers(network: Any) -> dict[str, int]:
    """Layers that compute something, by the type of their first output."""
    found: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name not in ("CONSTANT", "SHAPE"):
            found[layer.get_output(0).dtype.name] += 1
    return dict(found.most_common())


def kernels(plan: bytes) -> list[dict[str, Any]]:
    """What a run launches, by profile: how many kernels, those among them that copy a whole cache, and all by name."""
    found = []
    for program in _PROGRAM.findall(plan):
        launched = Counter(
            "product" if kind == b"fully_connected" else name.decode() for kind, name in _LAUNCH.findall(program)
        )
        copies = len(_CACHE_COPY.findall(program))
        found.append({"kernels": launched.total(), "copy a cache": copies, "by name": dict(launched.most_common())})
    return found


def of_a_step(bundle: Bundle, capability: str, batch: int) -> dict[str, Any]:
    """Of the first block's step. Raises MachineError without TensorRT-RTX."""
    blueprint = Blueprint.of(bundle, Options(batch=(batch, batch, batch), device=(capability,)))
    if blueprint.record.package != "tensorrt_rtx":
        raise MachineError(f"{blueprint.record.package} writes no program into its plans; expected tensorrt_rtx")
    parsed = Parsed(blueprint.trt, bundle.path(bundle.manifest.blocks[0].graphs[GRAPHS["step"]]))
    plan = parsed.built(builder_config(parsed, blueprint, GRAPHS["step"]))
    if plan is None:
        raise BundleError(f"the step does not build for {capability}: {parsed.log.take()}")
    unguided, guided = kernels(bytes(memoryview(plan)))
    return {
        "capability": capability,
        "version": blueprint.record.version,
        "precision": bundle.manifest.precision,
        "batch": batch,
        "layers": layers(parsed.network),
        "unguided": unguided,
        "guided": guided,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.plan", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", nargs="+", default=["8.9", "12.0"], metavar="X.Y", help="compute capabilities")
    parser.add_argument("--batch", type=int, default=8, metavar="N")
    asked = parser.parse_args()
    bundle = Bundle.open(asked.bundle)
    for capability in asked.device:
        print(json.dumps(of_a_step(bundle, capability, asked.batch)), flush=True)


if __name__ == "__main__":
    main()
