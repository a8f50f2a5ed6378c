"""One check in this process: python -m bench.gpu.checks.one NAME BUNDLE PROVIDER. Its outcome is the last line."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

from bench.gpu.checks import device, numbers, speed
from bench.gpu.checks.check import EVERY, Case, Check
from tarflow.runtime.bundle import Bundle

CHECKS = [
    Check(device.start, 90, EVERY),
    Check(numbers.parity, 60),
    Check(numbers.graphs, 45),
    Check(numbers.repeat, 45),
    Check(numbers.tile, 30),
    Check(device.cuda_python, 20, once=True, on_cpu=False),
    Check(speed.steps, 90),
    Check(speed.cpp, 45),
    Check(device.alternate, 60, once=True),
    Check(device.growth, 60, once=True),
    Check(device.threads, 60, once=True),
]


def main() -> None:
    name, folder, provider = sys.argv[1:]
    with contextlib.suppress(ImportError):
        if provider != "cpu":
            import torch  # noqa: F401  # the CUDA libraries that it loads serve ONNX Runtime too
    check = next(check for check in CHECKS if check.name == name)
    print(json.dumps(asdict(check.run(Case(Bundle.open(folder), provider)))))


if __name__ == "__main__":
    main()
