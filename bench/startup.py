"""How long a start takes: ``tarflow --help``, ``import tarflow``, ``import tarflow.runtime.flow``, a sample drawn.

``import tarflow`` adds a few milliseconds to Python alone, and both together are to stay under 50.

    python -m bench.startup [--against CHECKOUT] [--repeats 15]

Every row is a process of its own, taken by turns with the other checkout's; medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent.parent
STARTS = {
    "tarflow --help": ["-m", "tarflow.cli.main", "--help"],
    "Python alone": ["-c", "pass"],
    "import tarflow": ["-c", "import tarflow"],
    "import tarflow.runtime.flow": ["-c", "import tarflow.runtime.flow"],
    "one sample of the demo": ["-m", "tarflow.cli.main", "generate", "--n", "1", "--save", "sample.npy"],
}


def seconds(checkout: Path, command: list[str], folder: Path) -> float:
    """From nothing to the end of a process that runs ``checkout``."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, such as the commit before")
    parser.add_argument("--repeats", type=int, default=15)
    said = parser.parse_args()
    checkouts = [HERE, *([said.against.resolve()] if said.against else [])]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in STARTS.items():
            rounds = [[seconds(each, command, Path(folder)) for each in checkouts] for _ in range(said.repeats + 1)][1:]
            row = "".join(f"  {median(column) * 1e3:7.0f} ms" for column in zip(*rounds, strict=True))
            ratio = f"  {median(own / other for own, other in rounds):.2f} of the other's" if said.against else ""
            print(f"{name:<28}{row}{ratio}", flush=True)


if __name__ == "__main__":
    main()
