"""Record the bits that a checkout computes, so that a later checkout can be compared with an earlier one.

    python -m bench.bits before.json                        # record
    python -m bench.bits after.json --against before.json   # record, compare; exit 1 and name each entry that differs

An entry is the SHA-256 of exact bytes, or a short value as JSON: samples drawn in every way, encodings, exported files,
what PyTorch computes, what commands write and say, and what libtarflow draws where it is built. The last bits of a
float depend on the processor, its cores and the packages: a recording says what these were, and is compared with
recordings of the same machine alone. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

from bench.bits.bundles import DRAWN, exported, planned
from bench.bits.commands import commands
from bench.bits.draws import drawn, pytorch
from bench.bits.entries import Found, differences, under
from bench.bits.library import LIBRARY, by_library
from tarflow.runtime.machine import cores, processor

PACKAGES = ("numpy", "onnxruntime", "onnx", "torch", "safetensors", "Pillow")
NOTE = "bits of this machine: compare with recordings made on it alone"


def machine() -> dict[str, str]:
    """What the last bits depend on, beside the checkout."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"processor": processor(), "cores": str(cores()), "python": sys.version.split()[0], **versions}


def record() -> dict[str, str]:
    """All entries by name."""
    entries: dict[str, str] = {}

    def keep(place: str, found: Found) -> None:
        before = len(entries)
        entries.update(under(place, found))
        print(f"{place}: {len(entries) - before} entries", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        keep("exported", exported(work))
        keep("plan", planned(work))
        for name in (*DRAWN, "demo-planned"):
            keep(f"python {name}", drawn(work / name))
        keep("pytorch", pytorch(work))
        keep("command", commands(work))
        for name in DRAWN if LIBRARY.exists() else ():
            keep(f"libtarflow {name}", by_library(work / name))
    if not LIBRARY.exists():
        print(f"libtarflow: not recorded, because '{LIBRARY}' is not built: make cpp-dev")
    return entries


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.bits", description="Record the bits this checkout computes.")
    parser.add_argument("out", type=Path, help="the recording to write")
    parser.add_argument("--against", type=Path, help="an earlier recording of this machine")
    arguments = parser.parse_args()
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"the folder of '{arguments.out}' does not exist")
    before = json.loads(arguments.against.read_bytes()) if arguments.against else None
    if before and (others := differences(before["machine"], machine())):
        parser.error(f"'{arguments.against}' was recorded on another machine:\n  " + "\n  ".join(others))
    entries = record()
    content = {"format": "tarflow-bits", "note": NOTE, "machine": machine(), "entries": entries}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    if before:
        found = differences(before["entries"], entries)
        print("\n".join([*found, f"{len(found)} entries differ, of {len(entries)}"]))
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
