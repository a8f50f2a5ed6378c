"""Which containers of device code in ONNX Runtime's CUDA provider hold what: it says so itself when it is loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from bench.gpu.checkout import DEMO
from bench.gpu.standin.build import build
from bench.gpu.standin.log import read

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
START = "import sys, onnxruntime as o; o.InferenceSession(sys.argv[1], providers=['CUDAExecutionProvider'])"
ANY_GRAPH = DEMO / "block_00.forward.onnx"
OWN, FLASH = "N11onnxruntime", "N11onnxruntime5flash"  # as C++ spells namespaces in the names of symbols
STEP = re.compile(r"flash_fwd_splitkv_kernel\w*traitsILi64E\w*half_t")  # a step's attention in fp16, heads of 64


def registered(provider: Path) -> dict[int, list[str]]:
    """Names of kernels by their container's address in ``provider``, of this ONNX Runtime and for any Python."""
    standin = build()
    with tempfile.TemporaryDirectory() as place:
        site, log = Path(place) / "site", Path(place) / "log"
        usual = standin.packages / "onnxruntime"
        shutil.copytree(usual, site / "onnxruntime", copy_function=os.symlink)
        (site / PROVIDER).unlink()
        (site / PROVIDER).symlink_to(provider)
        environment = {**standin.environment(log), "PYTHONPATH": str(site), "STANDIN_KERNELS": "1"}
        subprocess.run([sys.executable, "-c", START, str(ANY_GRAPH)], env=environment, check=True, capture_output=True)
        events = read(log)
    addresses, names = {}, defaultdict(list)
    for event in events:
        if event.call == "container":
            addresses[event.values["number"]] = int(event.values["at"])
        elif event.call == "registered":
            names[addresses[event.values["container"]]].append(event.values["name"])
    return names


def own(provider: Path) -> set[int]:
    """Addresses of the containers with ONNX Runtime's own kernels, and of flash attention's with those alone that a
    step of a published shape launches: all that the graphs of a bundle have been seen to launch, and a quarter of the
    code.
    """
    found = set()
    for address, names in registered(provider).items():
        flash = any(FLASH in name for name in names)
        if any(STEP.search(name) if flash else OWN in name for name in names):
            found.add(address)
    return found
