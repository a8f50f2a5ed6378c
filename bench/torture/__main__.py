"""What kills, damaged files and hostile clients do to tarflow.

    python -m bench.torture            # all of it, for hours
    python -m bench.torture kills      # SIGKILL at the calls that change files; needs strace
    python -m bench.torture damage     # flipped bits, cut and absurd files, 20,000 a kind of file
    python -m bench.torture clients    # ten minutes of hostile clients beside honest ones

Each rewrites its section of bench/RESULTS-TORTURE.md, and exits with 1 if it found a fault; ``--sample`` tries a few of
each and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.torture import clients, damage, kills
from bench.torture.report import Section

PARTS = ("kills", "damage", "clients")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.torture", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--sample", action="store_true", help="a few of each; nothing is written")
    parser.add_argument("--only", default="", help="commands, or kinds of files, whose name begins so")
    parser.add_argument("--count", type=int, help="kills a command, damages a kind of file, or seconds of clients")
    parser.add_argument("--keep", type=Path, help="where to keep the files that were read wrongly")
    said = parser.parse_args()
    if strange := set(said.parts) - set(PARTS):
        parser.error(f"{', '.join(strange)}: expected one of {', '.join(PARTS)}")
    sections = [section(part, said) for part in said.parts]
    sys.exit(1 if any(made.faults for made in sections) else 0)


def section(part: str, said: argparse.Namespace) -> Section:
    """One part, tried, printed, and written unless it was a sample."""
    if part == "kills":
        made = kills.torture(said.count or (6 if said.sample else 300), said.only)
    elif part == "damage":
        made = damage.torture(said.count or (60 if said.sample else 20_000), said.only, said.keep)
    else:
        made = clients.torture(said.count or (20 if said.sample else 600))
    print(made.text(), flush=True)
    if not (said.sample or said.only):
        made.write()
    return made


if __name__ == "__main__":
    main()
