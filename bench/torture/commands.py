"""Commands of this checkout on a model so small that what they do to files is most of what they do."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from tarflow import checkpoint
from tarflow.config import Config
from tarflow.model import TarFlow
from tarflow.runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent.parent
TINY = Config(8, 1, 4, 64, 1, 1, 2, noise_std=0.1)
PRIORED = Config(8, 1, 4, 64, 1, 1, 2, nvp=False, noise_std=0.1)  # a bundle of it has a prior to read


def model(seed: int, config: Config = TINY) -> TarFlow:
    """A model whose weights are noise: its samples are as good as any for being compared."""
    made, dice = TarFlow(config), torch.Generator().manual_seed(seed)
    for weights in made.parameters():
        torch.nn.init.normal_(weights, 0, 0.02, dice)
    return made.eval()


def save(folder: Path, seed: int, suffix: str = ".pth", config: Config = TINY) -> Path:
    """Its checkpoint, under the name the trainer would give it."""
    path = folder / config.file_name(f"tiny{seed}", suffix)
    checkpoint.save(model(seed, config), path)
    return path


def bundle_of(folder: Path, seed: int, config: Config = TINY, check: bool = False) -> Bundle:
    """A bundle of it, at ``folder/bundle``; with ``check`` it is verified, and has a parity card."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(_exported(seed, config, check), folder / "bundle")
    return Bundle.open(folder / "bundle")


@cache
def _exported(seed: int, config: Config, check: bool) -> Path:
    """Exported once; by a process of its own, so that none of its threads is there when this one forks."""
    folder = Path(tempfile.mkdtemp(prefix="tarflow-torture-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    verify = "--verify" if check else "--no-verify"
    done = run(line("export", save(folder, seed, config=config), "-o", folder / "bundle", verify, "--no-build"))
    if done.returncode:
        raise SystemExit(f"the bundle for the torture cannot be made:\n{done.stderr}")
    return folder / "bundle"


def line(*words: object) -> list[str]:
    """A command line of this checkout."""
    return [sys.executable, "-m", "tarflow.cli.main", *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """Of a command: this checkout's code, no compiled files written, all else as here."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"} | more


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, whatever that is."""
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=False)
