"""The manifest: what a bundle says about itself. FORMAT.md is the normative text; this is its reader."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .document import Reader, short
from .errors import BundleError, Remedy
from .precision import PRECISIONS, Tolerance, native_tolerance

FORMAT = "tarflow-bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest of kilobytes is normal
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
KINDS = ("step", "forward", "gradient")
RESIDENT = "resident"  # for devices; a bundle written before there were any has none
FUSED = {
    1: "cuda",
    2: "cuda_guided",
}  # by guidance branches, for ONNX Runtime's CUDA provider; not every bundle has them
_MAY_BE_ABSENT = ("class_names", "noise_from", "source")
_OPTIONAL = (RESIDENT, *FUSED.values())
AGAIN = "copy the bundle again, or export it again"
UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # in a class's name, which goes to terminals and pages
LARGEST_NOISE = 1e18  # its square is a float32; images are in [-1, 1]


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
    graphs: Mapping[str, str]  # each of KINDS always, RESIDENT and FUSED maybe


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
    class_names: tuple[str, ...] = ()  # one a class, or none at all
    noise_from: str = ""  # where the training noise was read, in words; "" of bundles that do not say
    source: str | None = None  # where on a hub the checkpoint lay, and at which commit

    def class_name(self, label: int) -> str:
        """What to call a class: its name, else its number."""
        return self.class_names[label] if self.class_names else str(label)

    def certificate_limit(self, precision: str) -> float:
        """The round-trip error that the parity card allows samples drawn in a precision: the bundle's own, which they
        are encoded in again, or if that is wider the native engine's. What the card has no row of has what any card
        allows it.
        """
        own = _allowed(self.parity, PRECISIONS[self.precision].tolerance)
        if precision == self.precision:
            return own
        natives = self.parity.get("native")
        row = natives.get(precision) if isinstance(natives, dict) else None
        return max(own, _allowed(row, native_tolerance(self.precision, precision)))

    def to_json(self) -> str:
        document = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
        for key in _MAY_BE_ABSENT:
            if not document[key]:
                del document[key]
        return json.dumps(document, indent=1, sort_keys=False, allow_nan=False) + "\n"


def reader_of(source: str) -> Reader:
    """What reads a manifest."""
    folder = os.path.dirname(source)
    return Reader(source, "manifest", AGAIN, Remedy("export", {"folder": folder, "force": True} if folder else {}))


def read_manifest(content: bytes, source: str = MANIFEST) -> Manifest:
    """Parse and validate a manifest. Unknown keys are left alone; a missing or wrong one raises BundleError."""
    reader = reader_of(source)
    top = reader.parse(content)
    if top.get("format") != FORMAT:
        raise BundleError(f"'{source}' says format {short(top.get('format'))}; expected {FORMAT!r}: this is no bundle")
    if top.get("schema") != SCHEMA or type(top["schema"]) is not int:  # true and 1.0 equal 1
        raise BundleError(
            f"'{source}' has schema version {short(top.get('schema'))}; this tarflow reads version {SCHEMA}. "
            "Install the tarflow that wrote it, or export it again",
            remedy=Remedy("export"),
        )
    config = _read_config(reader, reader.get(top, "config", dict))
    files = {
        reader.confined(name): FileEntry(
            reader.hash(reader.get(reader.typed(entry, dict, name), "sha256", str)), reader.natural(entry, "size", 0)
        )
        for name, entry in reader.get(top, "files", dict).items()
    }
    blocks = tuple(_read_block(reader, entry, files, k) for k, entry in enumerate(reader.get(top, "blocks", list)))
    if len(blocks) != config.blocks:
        raise reader.wrong(f"{len(blocks)} blocks listed; config says {config.blocks}")
    for name in (WEIGHTS, GOLDEN):
        if name not in files:
            raise reader.wrong(f"files lacks {name}")
    exporter = reader.get(top, "exporter", dict)
    return Manifest(
        name=reader.get(top, "name", str),
        precision=reader.one_of(top, "precision", tuple(PRECISIONS)),
        config=config,
        blocks=blocks,
        files=files,
        opset=reader.natural(top, "opset", 1),
        exporter={k: reader.typed(v, str, f"exporter.{k}") for k, v in exporter.items()},
        parity=reader.get(top, "parity", dict),
        class_names=_read_class_names(reader, top, config.classes),
        noise_from=reader.get(top, "noise_from", str) if "noise_from" in top else "",
        source=reader.get(top, "source", str) if "source" in top else None,
    )


def _read_class_names(reader: Reader, top: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    if "class_names" not in top:
        return ()
    names = [
        reader.typed(name, str, f"class_names[{k}]") for k, name in enumerate(reader.get(top, "class_names", list))
    ]
    if len(names) != classes:
        raise reader.wrong(f"class_names has {len(names)} names; config says {classes} classes")
    for k, name in enumerate(names):
        if not name or UNPRINTABLE.search(name):
            raise reader.wrong(f"class_names[{k}] is {short(name)}; expected text without control characters")
    return tuple(names)


def _allowed(row: object, otherwise: Tolerance) -> float:
    """The largest round-trip error by a parity card, or a row of it; what is ``otherwise`` allowed if it says none."""
    told = row.get("tolerance") if isinstance(row, dict) else None
    allowed = told.get("certificate") if isinstance(told, dict) else None
    return float(allowed) if isinstance(allowed, (int, float)) else otherwise.certificate


def _read_config(reader: Reader, numbers: dict[str, Any]) -> ModelShape:
    if reader.get(numbers, "noise_std", object) is not None and reader.number(numbers, "noise_std", 0) > LARGEST_NOISE:
        raise reader.wrong(f"config.noise_std is {short(numbers['noise_std'])}; expected {LARGEST_NOISE:g} at most")
    positive = ("image_size", "channels", "patch_size", "width", "blocks", "layers", "head_dim")
    config = ModelShape(
        **{name: reader.natural(numbers, name, 1) for name in positive},
        classes=reader.natural(numbers, "classes", 0),
        nvp=reader.get(numbers, "nvp", bool),
        noise_std=numbers["noise_std"],
    )
    if config.image_size % config.patch_size or config.width % config.head_dim:
        raise reader.wrong("config: patch_size must divide image_size, and head_dim must divide width")
    return config


def _read_block(reader: Reader, entry: object, files: Mapping[str, FileEntry], k: int) -> BlockEntry:
    block = reader.typed(entry, dict, f"blocks[{k}]")
    graphs = reader.get(block, "graphs", dict)
    kinds = [*KINDS, *(kind for kind in _OPTIONAL if kind in graphs)]  # others, of other versions, are left alone
    for kind in kinds:
        name = graphs.get(kind)
        if not isinstance(name, str) or name not in files:
            raise reader.wrong(f"blocks[{k}].graphs.{kind} is {short(name)}, which is not among the files")
        if "/" in name or not name.endswith(".onnx"):  # by other suffixes ONNX Runtime takes a file for something else
            raise reader.wrong(f"blocks[{k}].graphs.{kind} is {short(name)}; expected an .onnx file beside the weights")
    if reader.get(block, "reversed", bool) != (k % 2 == 1):
        raise reader.wrong(f"blocks[{k}].reversed is {block['reversed']}; in schema {SCHEMA} odd blocks are, even not")
    return BlockEntry(reader.get(block, "reversed", bool), {kind: graphs[kind] for kind in kinds})
