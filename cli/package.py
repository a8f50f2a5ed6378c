"""``tarflow package``: a bundle in the form another server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..runtime.errors import InputError
from ..runtime.opening import Opening
from .console import emit, identity, numbers
from .options import BundleArgument, Json


def package(
    bundle: BundleArgument,
    triton: Annotated[Path | None, Option(help="Write a Triton model repository into this folder.")] = None,
    name: Annotated[str | None, Option(help="How the models' names begin. Default: the bundle's name.")] = None,
    models: Annotated[str | None, Option(help="Of sample, encode, denoise. Default: all this bundle can do.")] = None,
    instances: Annotated[int, Option(help="Instances of each model, on each device.")] = 1,
    max_batch: Annotated[int, Option(help="Rows computed at once, at most.")] = 64,
    delay: Annotated[float, Option(help="Seconds a request may wait for others to share its batch.")] = 0.005,
    gpu: Annotated[str | None, Option(help="GPUs, as in 0,1. Default: the CPU.")] = None,
    provider: Annotated[
        str | None, Option(help="Default: auto, what works there: with --gpu TensorRT engines, then CUDA.")
    ] = None,
    threads: Annotated[int | None, Option(help="Threads of an instance. Default: its share.")] = None,
    link: Annotated[bool, Option("--link/--copy", help="Link to the bundle instead of copying it.")] = False,
    force: Annotated[bool, Option("--force", help="Replace models of these names.")] = False,
    json: Json = False,
) -> None:
    """Write a model repository for Triton's Python backend: batching, instances, and this runtime inside.

    Example: tarflow package tarflow-bundle --triton models --instances 2 --max-batch 64
    """
    from ..serve.repository import TASKS, Models, Serving, write_repository

    if triton is None:
        raise InputError("a package for what? Pass `triton` DIR, the folder of a Triton model repository")
    if triton.exists() and not triton.is_dir():
        raise InputError(f"'{triton}' is a file; expected a folder, or a name for one")
    gpus = tuple(numbers(gpu)) if gpu is not None else ()
    if gpu is not None and not gpus:
        raise InputError.of("gpus", f"'{gpu}'", "device numbers, as in 0,1")
    opening = Opening(provider or "auto", threads)
    serving = Serving(instances, max_batch, delay, gpus, opening)
    able = TASKS if bundle.manifest.config.noise_std else TASKS[:2]
    tasks = able if models is None else tuple(part.strip() for part in models.split(","))
    written = write_repository(bundle, triton, serving, Models(tasks, name, link), force)
    if json:
        emit(**identity(bundle), repository=triton, models=[path.name for path in written], linked=link)
        return
    how = f"linked to '{bundle.folder}'" if link else "copied, hashes checked"
    print(f"{', '.join(path.name for path in written)} in '{triton}'; the bundle is {how}")
    print(f"run it: tritonserver --model-repository={triton.resolve()}, where Triton's Python has tarflow installed")
