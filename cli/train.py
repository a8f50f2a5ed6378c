"""``tarflow train``: train a model on a folder of images, or on the digits that come with scikit-learn."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..config import Config, parse_noise
from ..runtime.errors import InputError
from ..runtime.machine import cores, cpu_quota
from .console import emit, say
from .options import Json, Quiet, Threads
from .progress import bar, duration_text

Watch = Callable[[dict[str, Any]], None]  # is told each line of the log


def train(
    data: Annotated[str, Option(help="'digits', or a folder of images; subfolders are classes.")] = "digits",
    out: Annotated[Path, Option("-o", "--out", help="Folder for all that is written.")] = Path("runs/model"),
    image_size: Annotated[int, Option(help="Side of the images made from a folder, in pixels.")] = 64,
    channels: Annotated[int, Option(help="3 for colour, 1 for grey images made from a folder.")] = 3,
    hold_out: Annotated[int, Option(help="Keep every n-th image of a folder for measuring; 0 keeps none.")] = 0,
    patch_size: Annotated[int, Option(help="Side of a patch in pixels.")] = 2,
    width: Annotated[int, Option(help="Width of the transformers, a multiple of 64.")] = 128,
    blocks: Annotated[int, Option(help="Flow blocks.")] = 4,
    layers: Annotated[int, Option(help="Transformer layers in a block.")] = 3,
    volume_preserving: Annotated[bool, Option("--volume-preserving", help="Shift only, learned prior.")] = False,
    noise_std: Annotated[str, Option(help="Gaussian noise, images being in [-1, 1]; or 'uniform'.")] = "0.1",
    steps: Annotated[int, Option(help="Steps of the optimiser.")] = 4000,
    batch_size: Annotated[int, Option(help="Images in a step, over all processes.")] = 256,
    lr: Annotated[float, Option(help="Highest learning rate, between warm-up and cosine.")] = 1e-3,
    warmup: Annotated[int, Option(help="Steps of linear warm-up.")] = 200,
    weight_decay: Annotated[float, Option(help="Weight decay of AdamW.")] = 1e-4,
    drop_label: Annotated[float, Option(help="Share of labels dropped, which is what guidance needs.")] = 0.1,
    ema: Annotated[float, Option(help="Decay of the averaged weights, which are what is saved.")] = 0.999,
    grad_clip: Annotated[float, Option(help="Largest norm of a gradient; 0 for any.")] = 1.0,
    flip: Annotated[bool, Option("--flip", help="Mirror images at random.")] = False,
    jitter: Annotated[float, Option(help="Move images at random, by up to this many pixels, such as 0.25.")] = 0.0,
    seed: Annotated[int, Option(help="Seed of weights, order and noise.")] = 0,
    log_every: Annotated[int, Option(help="Steps between lines of the log.")] = 50,
    evaluate_every: Annotated[int, Option(help="Steps between measurements on held-out images.")] = 250,
    sample_every: Annotated[int, Option(help="Steps between sample grids; 0 draws none.")] = 500,
    save_every: Annotated[int, Option(help="Steps between saved states.")] = 500,
    samples: Annotated[int, Option(help="Images in a sample grid.")] = 100,
    guidance: Annotated[float, Option(help="Guidance of the sample grids.")] = 0.0,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str, Option(help="bfloat16 matrix products: auto (on CUDA), on (CPUs too) or off.")] = "auto",
    threads: Threads = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out, with the same options.")] = False,
    force: Annotated[bool, Option("--force", help="Start over, replacing the run in --out.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model: checkpoints (.pth and .safetensors), sample grids and a log in --out.

    Example: tarflow train --data digits --out runs/digits --noise-std 0.1 --steps 4000

    Several GPUs or processes: torchrun --nproc-per-node 2 -m tarflow.cli.main train --data photos --out runs/photos
    """
    import torch

    from ..train.data import digits, folder
    from ..train.loop import train as carry_out
    from ..train.processes import pick_device
    from ..train.recipe import Recipe, Run

    if threads is not None:
        if threads < 1:
            raise InputError.of("threads", threads, "1 or more")
        torch.set_num_threads(threads)
    elif cpu_quota() is not None:
        torch.set_num_threads(cores())
    recipe = Recipe(steps, batch_size, lr, warmup, weight_decay, drop_label, ema, grad_clip, flip, jitter, seed)
    every = (log_every, evaluate_every, sample_every, save_every)
    run = Run(out, pick_device(device), amp, resume, force, *every, samples, guidance)
    if data != "digits" and not Path(data).is_dir():
        raise InputError(f"no folder at '{data}'; expected 'digits' or a folder of images", field="data")
    dataset = digits() if data == "digits" else folder(data, image_size, channels, hold_out)
    for note in dataset.notes:
        if leads():
            say(note)
    shape = (dataset.image_size, dataset.channels, patch_size, width, blocks, layers)
    config = Config(*shape, len(dataset.classes), nvp=not volume_preserving, noise_std=parse_noise(noise_std))
    try:
        with log_lines(steps, quiet) as watch:
            result = carry_out(config, dataset, recipe, run, watch)
    except KeyboardInterrupt:
        if run.state.exists() and leads():
            say(f"stopped; the same command with --resume continues the run in '{out}'")
        raise
    if result is None:  # another process reports
        return
    if json:
        emit(**asdict(result))
    else:
        print(f"{result.steps} steps in {result.seconds:.0f} s")
        if result.bits_per_dim is not None:
            print(f"training: {result.bits_per_dim:.3f} bits/dim")
        if result.held_out_bits_per_dim is not None:
            print(f"held out: {result.held_out_bits_per_dim:.3f} bits/dim, over {result.held_out_draws} draws of noise")
        for path in result.files:
            print(f"  {path}")


def leads() -> bool:
    """Whether this process speaks for all that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def log_lines(steps: int, quiet: bool = False) -> Iterator[Watch]:
    """Shows the log on stderr: a bar on a terminal, a line each elsewhere, nothing on ranks other than 0."""
    if quiet or not leads():
        yield lambda line: None
    elif not sys.stderr.isatty():
        yield lambda line: say(f"step {line['step']}/{steps}  {summary(line)}")
    else:
        with bar("training", steps) as update:
            yield lambda line: update(completed=line["step"], description=summary(line))


def summary(line: dict[str, Any]) -> str:
    """A line of the log for people."""
    parts = [f"loss {line['loss']:.4f}", f"{line['bits_per_dim']:.3f} bits/dim"]
    if "held_out_bits_per_dim" in line:
        parts.append(f"held out {line['held_out_bits_per_dim']:.3f}")
    rate, left = line["images_per_second"], duration_text(line["seconds_left"])
    return "  ".join([*parts, f"{rate:.0f} images/s", f"{left} left"])
