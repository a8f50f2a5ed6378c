"""Options that several commands share, so that one word means one thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[BUNDLE]", help="A bundle folder. Default: ./tarflow-bundle if it is there, else the demo."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Provider = Annotated[
    str, typer.Option(help="cpu, cuda, tensorrt (engines of tarflow build), ort-tensorrt, or auto for the best here.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of one operator. Default: one a core.")]
Spinning = Annotated[
    bool | None, typer.Option("--spinning/--no-spinning", help="Let idle threads spin; not where cores are shared.")
]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="Keep only one block's graphs in memory.")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay a step on a GPU as one CUDA graph.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="How much memory to stay below, such as 8GiB: sets batches, and --low-memory if need be."),
]
Decode = Annotated[
    str | None,
    typer.Option(
        help="serial, exact (in parallel, to 1e-5) or fast (to 1e-3). Default: exact where tarflow calibrate found it "
        "faster."
    ),
]
Tolerance = Annotated[float | None, typer.Option(help="Decode in parallel until patches change by no more than this.")]
PatchSize = Annotated[int | None, typer.Option(help="Patch size, if the checkpoint's name does not say it.")]
Channels = Annotated[int | None, typer.Option(help="Image channels, another way to say the patch size.")]
NoiseStd = Annotated[
    str | None, typer.Option(help="Training noise, if the name does not say it: a number, or 'uniform'.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="A class (3), a range dealt out in turn (0-9), a list (1,4,7) or y.npy. Default: the null class."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Use Ray: a cluster (auto, HOST:PORT or ray://HOST:PORT), or alone the one of RAY_ADDRESS, else one here.",
    ),
]
_ADDRESS = re.compile(r"auto|local|(ray://)?[^\s/:]+:\d+|(ray://)?\[[0-9a-fA-F:]+\]:\d+")


class RayCommand(TyperCommand):
    """A command whose ``--ray`` may stand alone: it takes the next word only if that is an address.

    ``--ray`` alone means ``--ray=``, the empty address. (Typer's options have a value always or never.)
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        for i, word in enumerate(words):
            if word == "--":
                break
            if word == "--ray" and not _ADDRESS.fullmatch("".join(words[i + 1 : i + 2])):
                words[i] = "--ray="
        return super().parse_args(ctx, words)
