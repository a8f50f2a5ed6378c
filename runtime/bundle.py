"""The bundle: a folder of graphs, weights and a manifest. FORMAT.md is the normative text; this is its reader.

Nothing here needs an engine. Hashes are checked before anything in a bundle is handed to one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .files import sha256

FORMAT = "tarflow-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
PARITY = "PARITY.md"
KINDS = ("step", "forward", "gradient")
PRECISIONS = ("fp32", "fp16", "bf16")
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest of kilobytes is normal
REBUILD = "export it again: tarflow export CHECKPOINT -o BUNDLE --force"
_HEX = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


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
        try:
            if path.stat().st_size > MANIFEST_LIMIT:
                raise BundleError(f"'{path}' is larger than {MANIFEST_LIMIT >> 20} MiB; a manifest is not. {REBUILD}")
            content = path.read_bytes()
        except FileNotFoundError:
            raise BundleError(
                f"'{folder}' has no {MANIFEST}, so it is not a bundle; make one with: tarflow export -o BUNDLE"
            ) from None
        except OSError as error:
            raise BundleError(f"'{path}' cannot be read: {error.strerror}") from None
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
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise BundleError(
                f"'{path}' is missing, though the manifest names it. Copy the bundle again, or {REBUILD}"
            ) from None
        if not resolved.is_relative_to(self.folder.resolve()) or not resolved.is_file():
            raise BundleError(f"'{path}' leads out of the bundle or is no regular file; a bundle's files lie inside it")
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
            return np.ones(shape, np.float32)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path(WEIGHTS)), framework="np") as file:
                variance: NDArray[np.float32] = file.get_tensor("var")
        except (SafetensorError, OSError) as error:
            raise BundleError(f"'{self.folder / WEIGHTS}' holds no prior variance 'var' ({error}). {REBUILD}") from None
        if variance.shape != shape or variance.dtype != np.float32 or not (variance >= 0).all():
            raise BundleError(
                f"'{self.folder / WEIGHTS}': the prior variance is {variance.dtype} {variance.shape}; "
                f"expected float32 {shape}, not negative"
            )
        return variance


def read_manifest(content: bytes, source: str = MANIFEST) -> Manifest:
    """Parse and validate a manifest. Unknown keys are left alone; a missing or wrong one raises BundleError."""
    try:
        document = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"'{source}' is damaged: it is not JSON ({str(error)[:120]}). Copy the bundle again, or {REBUILD}"
        ) from None
    reader = _Reader(source)
    top = reader.typed(document, dict, "the document")
    if top.get("format") != FORMAT:
        raise BundleError(f"'{source}' says format {top.get('format')!r}; expected {FORMAT!r}: this is no bundle")
    if top.get("schema") != SCHEMA or isinstance(top.get("schema"), bool):
        raise BundleError(
            f"'{source}' has schema version {top.get('schema')!r}; this tarflow reads version {SCHEMA}. Install the "
            f"tarflow that wrote it, or {REBUILD}"
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
        raise reader.wrong(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
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


def _read_config(reader: _Reader, numbers: dict[str, Any]) -> ModelShape:
    noise_std = numbers.get("noise_std")
    if noise_std is not None and not (
        isinstance(noise_std, (int, float)) and not isinstance(noise_std, bool) and 0 <= noise_std < math.inf
    ):
        raise reader.wrong(f"config.noise_std is {noise_std!r}; expected null or a number of 0 or more")
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


def _read_block(reader: _Reader, entry: object, files: Mapping[str, FileEntry], k: int) -> BlockEntry:
    block = reader.typed(entry, dict, f"blocks[{k}]")
    graphs = reader.get(block, "graphs", dict)
    for kind in KINDS:
        if graphs.get(kind) not in files:
            raise reader.wrong(f"blocks[{k}].graphs.{kind} is {graphs.get(kind)!r}, which is not among the files")
    return BlockEntry(reader.get(block, "reversed", bool), {kind: graphs[kind] for kind in KINDS})


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to a JSON document that names the place when something is wrong."""

    source: str

    def wrong(self, what: str) -> BundleError:
        return BundleError(f"'{self.source}': {what}. The manifest is damaged or was edited; {REBUILD}")

    def typed(self, value: object, kind: type[T], where: str) -> T:
        if not isinstance(value, kind):
            raise self.wrong(f"{where} is {type(value).__name__}; expected {kind.__name__}")
        return value

    def get(self, mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
        if key not in mapping:
            raise self.wrong(f"'{key}' is missing")
        return self.typed(mapping[key], kind, f"'{key}'")

    def natural(self, mapping: Mapping[str, Any], key: str, least: int) -> int:
        value = self.get(mapping, key, int)
        if isinstance(value, bool) or not least <= value < 2**63:
            raise self.wrong(f"'{key}' is {value}; expected an integer of {least} or more")
        return value

    def hash(self, value: str) -> str:
        if not _HEX.fullmatch(value):
            raise self.wrong(f"'{value[:70]}' is no SHA-256 in lower-case hexadecimal")
        return value

    def confined(self, name: str) -> str:
        """A relative path of plain components, with forward slashes, that stays inside the bundle."""
        parts = name.split("/")
        if not name or "\\" in name or ":" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise BundleError(
                f"'{self.source}' names the file '{name}', which is not a plain relative path inside the "
                "bundle; it was not opened"
            )
        return name


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
