"""A Triton model repository from a bundle: one folder a model, each whole by itself, for Triton's Python backend.

    DIR/digits-sample/config.pbtxt      what Triton is told: tensors, batching, instances
    DIR/digits-sample/1/model.py        repository_model.py of this package: a few lines that import triton_model.py
    DIR/digits-sample/1/bundle/         the bundle: copied, or a link to it

The first dimension of every tensor is samples, so that Triton's dynamic batcher joins requests as for any model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..runtime.bundle import MANIFEST, Bundle, ModelShape
from ..runtime.errors import InputError
from ..runtime.files import check_replaceable, check_room, replacing_folder
from ..runtime.opening import ON_DEVICE, Opening

TASKS = ("sample", "encode", "denoise")
CONFIG = "config.pbtxt"
FORMAT = "tarflow-triton"
_MODEL = Path(__file__).with_name("repository_model.py")
_ANY = Opening()
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton is to run the models.

    ``instances`` processes a device, each with its own copy of the weights in memory; ``max_batch`` rows at once;
    ``delay`` seconds a request may wait for others; ``gpus`` device numbers, none for the CPU. Of ``opening`` provider
    and threads count; threads None shares the cores among the instances. Raises InputError for numbers out of range.
    """

    instances: int = 1
    max_batch: int = 64
    delay: float = 0.005
    gpus: tuple[int, ...] = ()
    opening: Opening = _ANY

    def __post_init__(self) -> None:
        for name, value, most in (("instances", self.instances, 1024), ("max_batch", self.max_batch, 1 << 16)):
            if not 1 <= value <= most:
                raise InputError.of(name, value, f"1 to {most}")
        if not 0 <= self.delay <= 60:
            raise InputError.of("delay", self.delay, "seconds, 0 to 60")
        if any(not 0 <= gpu < 1024 for gpu in self.gpus) or len({*self.gpus}) < len(self.gpus):
            raise InputError.of("gpus", ",".join(map(str, self.gpus)), "different device numbers, as in 0,1")
        if self.opening.device:
            raise InputError(f"`provider` {self.opening.provider} names a device; in a repository `gpus` do that")
        if self.opening.provider in ON_DEVICE and not self.gpus:
            raise InputError(f"`provider` {self.opening.provider} needs a GPU: name the devices in `gpus`, as in 0,1")


@dataclass(frozen=True, slots=True)
class Models:
    """Which models a repository gets: one a task, its name beginning with ``name`` (the bundle's own by default), each
    with a copy of the bundle or, with ``link``, a link to where it is. Raises InputError for what is no task or name.
    """

    tasks: tuple[str, ...] = TASKS
    name: str | None = None
    link: bool = False

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise InputError.of("tasks", ",".join(unknown) or "empty", f"some of {', '.join(TASKS)}")

    def folders(self, bundle: Bundle, folder: Path) -> dict[str, Path]:
        """Each task's own, below ``folder``. Raises InputError for what this bundle cannot do or be named."""
        stem = bundle.manifest.name if self.name is None else self.name
        if not _NAME.fullmatch(stem):
            raise InputError(f"'{stem}' is no model name for Triton: letters, digits, _ . and -; give another `name`")
        if "denoise" in self.tasks and not bundle.manifest.config.noise_std:
            raise InputError("this model was trained without Gaussian noise, so it has no denoise: drop it of `tasks`")
        return {task: folder / f"{stem}-{task}" for task in self.tasks}


def write_repository(bundle: Bundle, folder: Path, serving: Serving, models: Models, force: bool = False) -> list[Path]:
    """Write models below ``folder`` -> their folders. Each appears whole or not at all.

    The bundle is copied once where the file system has hard links, and the copy's hashes are checked. Raises InputError
    for names that are none or exist (unless ``force`` and ours), BundleError for a damaged bundle.
    """
    folders = models.folders(bundle, folder)
    bundle.check()
    for path in folders.values():
        check_replaceable(path, force, CONFIG)
    if not models.link:
        check_room(folder, sum(entry.size for entry in bundle.manifest.files.values()))
    with contextlib.ExitStack() as all_or_none:  # every model is complete before the first appears
        first: Path | None = None
        for task, path in folders.items():
            partial = all_or_none.enter_context(replacing_folder(path, force, CONFIG))
            (partial / CONFIG).write_text(config_text(path.name, task, bundle, serving))
            (partial / "1").mkdir()
            shutil.copyfile(_MODEL, partial / "1" / "model.py")
            inside = partial / "1" / "bundle"
            if models.link:
                inside.symlink_to(bundle.folder.resolve())
            else:
                _copy(bundle, inside, first)
                first = first or inside
    return list(folders.values())


def _copy(bundle: Bundle, target: Path, twin: Path | None) -> None:
    """The bundle's files at ``target``: hard links to the copy ``twin`` where that works, else copies; checked."""
    engines = [path for path in (bundle.folder / "engines").rglob("*") if path.is_file() and not path.is_symlink()]
    names = [MANIFEST, *bundle.manifest.files, *(str(path.relative_to(bundle.folder)) for path in engines)]
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if twin is not None:
            with contextlib.suppress(OSError):
                os.link(twin / name, file)
                continue
        shutil.copyfile(bundle.folder / name, file)
    Bundle.open(target).check()


def config_text(name: str, task: str, bundle: Bundle, serving: Serving) -> str:
    """config.pbtxt of one model, in protobuf's text format."""
    inputs, outputs = _tensors(task, bundle.manifest.config)
    where = f"kind: KIND_GPU gpus: [{', '.join(map(str, serving.gpus))}]" if serving.gpus else "kind: KIND_CPU"
    parameters = {
        "task": task,
        "bundle_sha256": bundle.hash,
        "provider": serving.opening.provider,
        "threads": "share" if serving.opening.threads is None else str(serving.opening.threads),  # "" is dropped
        "instances": str(serving.instances * max(1, len(serving.gpus))),
        "tarflow_version": version("tarflow"),
    }
    preferred = [size for size in (16, 32, 64, 128) if size <= serving.max_batch]
    return "\n".join(
        [
            f'# "format": "{FORMAT}", written by tarflow',
            f'name: "{name}"',
            'backend: "python"',
            f"max_batch_size: {serving.max_batch}",
            *(f"input {tensor}" for tensor in inputs),
            *(f"output {tensor}" for tensor in outputs),
            "dynamic_batching {",
            *([f"  preferred_batch_size: {preferred}"] if preferred else []),
            f"  max_queue_delay_microseconds: {round(serving.delay * 1e6)}",
            "}",
            f"instance_group {{ count: {serving.instances} {where} }}",
            *(f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in parameters.items()),
            "",
        ]
    )


def _tensors(task: str, config: ModelShape) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a model; dimensions without the first, which is samples."""
    image, latent, one = config.image, (config.tokens, config.patch_dim), (1,)
    label = _tensor("label", "INT64", one, optional=True)  # absent or -1: the null class
    images = _tensor("images", "FP32", image)
    if task == "sample":
        wanted = [_tensor("seed", "INT64", one), _tensor("index", "INT64", one), label]
        checked = [_tensor("certificate", "FP32", one), _tensor("log_prob", "FP64", one)]
        return [*wanted, _tensor("guidance", "FP32", one, optional=True)], [images, *checked]
    if task == "denoise":
        return [images, label, _tensor("strength", "FP32", one, optional=True)], [images]
    numbers = [_tensor(name, "FP32", one) for name in ("log_det", "bits_per_dim")]
    return [images, label], [_tensor("latent", "FP32", latent), *numbers]


def _tensor(name: str, kind: str, dims: tuple[int, ...], optional: bool = False) -> str:
    ending = " optional: true" if optional else ""
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [{", ".join(map(str, dims))}]{ending} }}'
