"""Unpack what :mod:`bench.gpu.prepare` packed, and run something with it:

    python -m bench.gpu.unpack FOLDER ... --to SITE [-- python -m bench.gpu.checks ...]

Needs Python alone. What was unpacked before stays as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.checkout import ROOT


def unpack(folders: Sequence[Path], site: Path) -> None:
    """Every archive of the folders to ``site``, several at a time."""
    archives = [path for folder in folders for path in sorted(folder.glob("*.tar.xz"))]
    if not archives:
        raise SystemExit(f"no *.tar.xz in {', '.join(map(str, folders))}; expected what bench.gpu.prepare wrote")
    done = site / ".unpacked"
    done.mkdir(parents=True, exist_ok=True)

    def one(archive: Path) -> None:
        mark = done / archive.name
        if not mark.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(site, filter="data")
            mark.touch()

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, archives))


def environment(site: Path) -> dict[str, str]:
    """For a process that is to use what was unpacked, and the CUDA libraries that PyTorch brought."""
    libraries = [str(path) for path in nvidia()]
    variables = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": [str(site), str(ROOT)]}
    found = dict(os.environ)
    for name, paths in variables.items():
        found[name] = os.pathsep.join(filter(None, [*paths, os.environ.get(name, "")]))
    if (site / "libtarflow.so").exists():
        found["TARFLOW_LIBRARY"] = str(site / "libtarflow.so")
    return found


def nvidia() -> list[Path]:
    """Folders of libraries in the packages named nvidia-*."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return sorted(path for root in roots for path in Path(root).glob("*/lib"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.unpack", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--to", type=Path, required=True, metavar="SITE")
    arguments = sys.argv[1:]
    command = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    asked = parser.parse_args(arguments[: arguments.index("--")] if command else arguments)
    unpack(asked.folders, asked.to)
    if command:
        os.execvpe(command[0], command, environment(asked.to.resolve()))


if __name__ == "__main__":
    main()
