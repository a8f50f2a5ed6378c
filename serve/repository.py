"""A Triton model repository from a bundle: one folder a model, each whole by itself, for Triton's Python backend.

    DIR/digits-sample/config.pbtxt      what Triton is told: tensors, batching, instances
    DIR/digits-sample/1/model.py        repository_model.py of this package
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

from ..runtime.backend import NAMES
from ..runtime.bundle import MANIFEST, Bundle, ModelShape
from ..runtime.errors import InputError
from ..runtime.files import check_replaceable, replacing_folder

TASKS = ("sample", "encode", "denoise")
CONFIG = "config.pbtxt"
FORMAT = "tarflow-triton"
_MODEL = Path(__file__).with_name("repository_model.py")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton is to run the models.

    ``instances`` processes a device, each with its own copy of the weights in memory; ``max_batch`` rows at once;
    ``delay`` seconds a request may wait for others; ``gpus`` device numbers, none for the CPU. ``provider`` and
    ``threads`` are Flow's; threads None shares the cores among the instances.
    """

    instances: int = 1
    max_batch: int = 64
    delay: float = 0.005
    gpus: tuple[int, ...] = ()
    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("instances", self.instances, 1024), ("max-batch", self.max_batch, 1 << 16)):
            if not 1 <= value <= most:
                raise InputError(f"--{name} is {value}; expected 1 to {most}")
        if not 0 <= self.delay <= 60:
            raise InputError(f"--delay is {self.delay}; expected seconds, 0 to 60")
        if any(not 0 <= gpu < 1024 for gpu in self.gpus) or len({*self.gpus}) < len(self.gpus):
            raise InputError(f"--gpu names {self.gpus}; expected different device numbers, as in 0,1")
        if self.provider not in NAMES:
            raise InputError(f"provider '{self.provider}' is unknown; expected one of {', '.join(NAMES)}")
        if self.provider != "cpu" and not self.gpus:
            raise InputError(f"provider {self.provider} needs a GPU: name the devices, as in --gpu 0")


def write_repository(
    bundle: Bundle,
    folder: Path,
    serving: Serving,
    tasks: tuple[str, ...],
    name: str | None = None,
    link: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write one model a task below ``folder`` -> the models' folders. Each appears whole or not at all.

    ``name`` begins the models' names (the bundle's own by default). With ``link`` they point at the bundle where it
    is; otherwise it is copied, once where the file system has hard links, and the copy's hashes are checked. Raises
    InputError for names that are none or exist (unless ``force`` and ours), BundleError for a damaged bundle.
    """
    stem = bundle.manifest.name if name is None else name
    if not _NAME.fullmatch(stem):
        raise InputError(f"the model name '{stem}' is none for Triton: letters, digits, _ . and -; pass --name")
    models = {task: folder / f"{stem}-{task}" for task in _possible(tasks, bundle.manifest.config)}
    bundle.check()
    for path in models.values():
        check_replaceable(path, force, CONFIG)
    with contextlib.ExitStack() as all_or_none:  # every model is complete before the first appears
        first: Path | None = None
        for task, path in models.items():
            partial = all_or_none.enter_context(replacing_folder(path, force, CONFIG))
            (partial / CONFIG).write_text(config_text(path.name, task, bundle, serving))
            (partial / "1").mkdir()
            shutil.copyfile(_MODEL, partial / "1" / "model.py")
            inside = partial / "1" / "bundle"
            if link:
                inside.symlink_to(bundle.folder.resolve())
            else:
                _copy(bundle, inside, first)
                first = first or inside
    return list(models.values())


def _possible(tasks: tuple[str, ...], config: ModelShape) -> list[str]:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"--models names {', '.join(unknown) or 'none'}; expected some of {', '.join(TASKS)}")
    if "denoise" in tasks and not config.noise_std:
        raise InputError("this model was trained without Gaussian noise, so it has no denoise; --models sample,encode")
    return list(dict.fromkeys(tasks))


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
        "provider": serving.provider,
        "threads": "share" if serving.threads is None else str(serving.threads),  # Triton drops empty strings
        "instances": str(serving.instances * max(1, len(serving.gpus))),
        "tarflow_version": version("tarflow"),
    }
    preferred = [size for size in (16, 32, 64, 128) if size <= serving.max_batch]
    return "\n".join(
        [
            f'# "format": "{FORMAT}", written by tarflow package',
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
    label = _tensor("label", "INT64", one, optional=True)  # absent or below 0: the null class
    images = _tensor("images", "FP32", image)
    if task == "sample":
        wanted = [_tensor("seed", "INT64", one), _tensor("index", "INT64", one), label]
        return [*wanted, _tensor("guidance", "FP32", one, optional=True)], [images, _tensor("certificate", "FP32", one)]
    if task == "denoise":
        return [images, label, _tensor("strength", "FP32", one, optional=True)], [images]
    numbers = [_tensor(name, "FP32", one) for name in ("log_det", "bits_per_dim")]
    return [images, label], [_tensor("latent", "FP32", latent), *numbers]


def _tensor(name: str, kind: str, dims: tuple[int, ...], optional: bool = False) -> str:
    ending = " optional: true" if optional else ""
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [{", ".join(map(str, dims))}]{ending} }}'
