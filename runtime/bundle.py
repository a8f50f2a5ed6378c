"""The bundle: a folder of graphs, weights and a manifest. FORMAT.md is the normative text; this is its reader.

Nothing here needs an engine. Hashes are checked before anything in a bundle is handed to one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .document import Reader, short
from .errors import BundleError
from .files import sha256

FORMAT = "tarflow-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
PARITY = "PARITY.md"
KINDS = ("step", "forward", "gradient")
DEVICE_KINDS = ("resident", "pingpong")  # for engines; a bundle written before there were any has none
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest of kilobytes is normal
REBUILD = "export it again: tarflow export CHECKPOINT -o BUNDLE --force"
_LARGEST_FLOAT = sys.float_info.max


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of the model inside, as FORMAT.md names them. ``noise_std`` None: uniform dequantisation."""

    image_size: int
    channels: int
    patch_size: int
    width: int
    blocks: int
    layers: int
    classes: int
    nvp: bool
    noise_std: float | None
    head_dim: int

    @property
    def tokens(self) -> int:
        """T: patches in a sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """D: numbers in a patch."""
        return self.channels * self.patch_size**2

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of one image."""
        return self.channels, self.image_size, self.image_size


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One flow block: the direction it reads the sequence in, and its graphs by kind."""

    reversed: bool
    graphs: Mapping[str, str]

    def has(self, kind: str) -> bool:
        """Whether there is a graph of this kind: one of KINDS always, of DEVICE_KINDS maybe."""
        return kind in self.graphs


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says about itself. Immutable; :func:`read_manifest` and :meth:`to_json` are inverses."""

    name: str
    precision: str
    config: ModelShape
    blocks: tuple[BlockEntry, ...]
    files: Mapping[str, FileEntry]
    opset: int
    exporter: Mapping[str, str]
    parity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        document = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
        return json.dumps(document, indent=1, sort_keys=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle folder: its manifest, and paths to files known to be inside it."""

    folder: Path
    manifest: Manifest
    hash: str  # SHA-256 of manifest.json, which names every other file's: the bundle's identity

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and check that every file is inside the folder and of its size. Hashes: :meth:`check`.

        Raises BundleError for anything that is not a whole bundle this version understands.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(
                f"no bundle at '{folder}': expected a folder with {MANIFEST}; make one with: tarflow "
                f"export -o '{folder}'"
            )
        path = folder / MANIFEST
        if not path.is_symlink() and not path.exists():
            raise BundleError(
                f"'{folder}' has no {MANIFEST}, so it is not a bundle; make one with: tarflow export -o BUNDLE"
            )
        _require_inside(folder, path)
        try:
            with path.open("rb") as file:
                content = file.read(MANIFEST_LIMIT + 1)
        except OSError as error:
            raise BundleError(f"'{path}' cannot be read: {error.strerror}") from None
        if len(content) > MANIFEST_LIMIT:
            raise BundleError(f"'{path}' is larger than {MANIFEST_LIMIT >> 20} MiB; a manifest is not. {REBUILD}")
        bundle = cls(folder, read_manifest(content, str(path)), hashlib.sha256(content).hexdigest())
        for name, entry in bundle.manifest.files.items():
            size = bundle.path(name).stat().st_size
            if size != entry.size:
                raise BundleError(
                    f"'{folder / name}' has {size} bytes; the manifest says {entry.size}: it is truncated "
                    f"or changed. Copy the bundle again, or {REBUILD}"
                )
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file the manifest names. Raises BundleError if it is missing or leads out of the folder."""
        path = self.folder / name
        _require_inside(self.folder, path)
        return path

    def check(self, *names: str) -> None:
        """Compare SHA-256 of the named files (all of them by default) with the manifest. Raises BundleError."""
        for name in names or tuple(self.manifest.files):
            found = sha256(self.path(name))
            if found != self.manifest.files[name].sha256:
                raise BundleError(
                    f"'{self.folder / name}' is damaged or was changed: its SHA-256 is {found[:16]}..., the manifest "
                    f"says {self.manifest.files[name].sha256[:16]}... Copy the bundle again, or {REBUILD}"
                )

    def check_runnable(self) -> None:
        """Everything to know before an engine is given the graphs: hashes, no stranger among the files, and that the
        manifest's configuration is the one the weights carry. Raises BundleError.
        """
        from safetensors import SafetensorError, safe_open

        self.check(*(name for name in self.manifest.files if name not in (GOLDEN, PARITY)))
        named = {*self.manifest.files, MANIFEST}
        strange = sorted(p.name for p in self.folder.iterdir() if not p.is_dir() and p.name not in named)
        if strange:  # a graph could read its weights from there, unhashed
            raise BundleError(
                f"'{self.folder}' holds files its manifest does not name: {', '.join(strange[:4])}; remove them, or "
                "copy the bundle again"
            )
        try:
            with safe_open(str(self.path(WEIGHTS)), framework="np") as file:
                said = json.loads((file.metadata() or {}).get("tarflow.config", "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"'{self.folder / WEIGHTS}' cannot be read ({error}). {REBUILD}") from None
        if said != asdict(self.manifest.config):
            raise BundleError(f"'{self.folder}': the manifest describes another model than its weights do. {REBUILD}")

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """All tensors of a small safetensors file in the bundle, as numpy arrays. Checked first."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.check(name)
        try:
            return load_file(self.path(name))
        except (SafetensorError, OSError, KeyError) as error:
            raise BundleError(f"'{self.folder / name}' cannot be read ({error}). {REBUILD}") from None

    def prior_variance(self) -> NDArray[np.float32]:
        """(T, D): the variance of each latent; ones but for volume-preserving models."""
        config = self.manifest.config
        shape = (config.tokens, config.patch_dim)
        if config.nvp:
            try:
                return np.ones(shape, np.float32)
            except (ValueError, MemoryError):
                raise BundleError(
                    f"'{self.folder / MANIFEST}' describes images of {config.image_size} pixels a side, more than this "
                    f"machine can hold: it was edited, or made for another machine. {REBUILD}"
                ) from None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path(WEIGHTS)), framework="np") as file:
                variance: NDArray[np.float32] = file.get_tensor("var")
        except (SafetensorError, OSError) as error:
            raise BundleError(f"'{self.folder / WEIGHTS}' holds no prior variance 'var' ({error}). {REBUILD}") from None
        if (
            variance.shape != shape
            or variance.dtype != np.float32
            or not (np.isfinite(variance) & (variance >= 0)).all()
        ):
            raise BundleError(
                f"'{self.folder / WEIGHTS}': the prior variance is {variance.dtype} {variance.shape}; "
                f"expected float32 {shape}, finite and not negative"
            )
        return variance


def _require_inside(folder: Path, path: Path) -> None:
    """Raise BundleError unless ``path`` is a regular file that lies, links followed, in ``folder``."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BundleError(
            f"'{path}' is missing, though the manifest names it. Copy the bundle again, or {REBUILD}"
        ) from None
    if not resolved.is_relative_to(folder.resolve()) or not resolved.is_file():
        raise BundleError(f"'{path}' leads out of the bundle or is no regular file; a bundle's files lie inside it")


def read_manifest(content: bytes, source: str = MANIFEST) -> Manifest:
    """Parse and validate a manifest. Unknown keys are left alone; a missing or wrong one raises BundleError."""
    reader = Reader(source, "manifest", f"copy the bundle again, or {REBUILD}")
    top = reader.parse(content)
    if top.get("format") != FORMAT:
        raise BundleError(f"'{source}' says format {short(top.get('format'))}; expected {FORMAT!r}: this is no bundle")
    if top.get("schema") != SCHEMA or type(top["schema"]) is not int:  # true and 1.0 equal 1
        raise BundleError(
            f"'{source}' has schema version {short(top.get('schema'))}; this tarflow reads version {SCHEMA}. "
            f"Install the tarflow that wrote it, or {REBUILD}"
        )
    config = _read_config(reader, reader.get(top, "config", dict))
    files = {
        reader.confined(name): FileEntry(
            reader.hash(reader.get(reader.typed(entry, dict, name), "sha256", str)),
            reader.natural(entry, "size", 0),
        )
        for name, entry in reader.get(top, "files", dict).items()
    }
    blocks = tuple(_read_block(reader, entry, files, k) for k, entry in enumerate(reader.get(top, "blocks", list)))
    if len(blocks) != config.blocks:
        raise reader.wrong(f"{len(blocks)} blocks listed; config says {config.blocks}")
    for name in (WEIGHTS, GOLDEN):
        if name not in files:
            raise reader.wrong(f"files lacks {name}")
    precision = reader.get(top, "precision", str)
    if precision not in PRECISIONS:
        raise reader.wrong(f"precision is {short(precision)}; expected one of {', '.join(PRECISIONS)}")
    exporter = reader.get(top, "exporter", dict)
    return Manifest(
        name=reader.get(top, "name", str),
        precision=precision,
        config=config,
        blocks=blocks,
        files=files,
        opset=reader.natural(top, "opset", 1),
        exporter={k: reader.typed(v, str, f"exporter.{k}") for k, v in exporter.items()},
        parity=reader.get(top, "parity", dict),
    )


def _read_config(reader: Reader, numbers: dict[str, Any]) -> ModelShape:
    if "noise_std" not in numbers:
        raise reader.wrong("'noise_std' is missing")
    noise_std = numbers["noise_std"]
    if noise_std is not None and not (
        isinstance(noise_std, (int, float)) and not isinstance(noise_std, bool) and 0 <= noise_std <= _LARGEST_FLOAT
    ):
        raise reader.wrong(f"config.noise_std is {short(noise_std)}; expected null or a number of 0 or more")
    positive = ("image_size", "channels", "patch_size", "width", "blocks", "layers", "head_dim")
    config = ModelShape(
        **{name: reader.natural(numbers, name, 1) for name in positive},
        classes=reader.natural(numbers, "classes", 0),
        nvp=reader.get(numbers, "nvp", bool),
        noise_std=noise_std,
    )
    if config.image_size % config.patch_size or config.width % config.head_dim:
        raise reader.wrong("config: patch_size must divide image_size, and head_dim must divide width")
    return config


def _read_block(reader: Reader, entry: object, files: Mapping[str, FileEntry], k: int) -> BlockEntry:
    block = reader.typed(entry, dict, f"blocks[{k}]")
    graphs = reader.get(block, "graphs", dict)
    kinds = [*KINDS, *(kind for kind in DEVICE_KINDS if kind in graphs)]
    for kind in kinds:
        name = graphs.get(kind)
        if not isinstance(name, str) or name not in files:
            raise reader.wrong(f"blocks[{k}].graphs.{kind} is {short(name)}, which is not among the files")
    if reader.get(block, "reversed", bool) != (k % 2 == 1):
        raise reader.wrong(f"blocks[{k}].reversed is {block['reversed']}; in schema {SCHEMA} odd blocks are, even not")
    return BlockEntry(reader.get(block, "reversed", bool), {kind: graphs[kind] for kind in kinds})
