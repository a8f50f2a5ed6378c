"""Load and save TarFlow weights. The reference implementation's state-dict names live here and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import CARRIED, SAID, Config, ConfigError, Hints, infer, parse_noise
from .model import TarFlow
from .runtime.claims import check_archive, check_size
from .runtime.errors import BundleError
from .runtime.files import replacing_by_name
from .runtime.hub import INDEX as INDEX
from .runtime.hub import checkpoint_at
from .wrapping import weights_of

CONFIG_KEY = "tarflow.config"  # safetensors metadata: the Config as JSON, so that nothing need be inferred
DERIVED = "derived."  # tensors computed from others for the graphs; not part of a checkpoint
SCALE = "_scale"  # DERIVED + name + SCALE: the scales (out,) of a weight that is stored as int8, (in, out)

# Our module names -> the reference's, applied in this order.
_RENAME = (
    (re.compile(r"^prior$"), "var"),
    (re.compile(r"\.layers\.(\d+)\.norm\."), r".attn_blocks.\1.mlp.norm."),
    (re.compile(r"\.layers\.(\d+)\.up\."), r".attn_blocks.\1.mlp.main.0."),
    (re.compile(r"\.layers\.(\d+)\.down\."), r".attn_blocks.\1.mlp.main.2."),
    (re.compile(r"\.layers\.(\d+)\."), r".attn_blocks.\1."),
)
_FAMILY = re.compile(
    r"var|blocks\.(\d+)\.(?:pos_embed|class_embed|(?:proj_in|proj_out)\.(?:weight|bias)"
    r"|attn_blocks\.(\d+)\.(?:attention\.(?:norm|qkv|proj)|mlp\.(?:norm|main\.[02]))\.(?:weight|bias))"
)
_MASK = re.compile(r"^blocks\.\d+\.attn_mask$")  # a buffer of the reference: causal, 33 MB at T = 1024, ignored
_IMAGE = 16  # numbers of an image for each weight: real models have far fewer
_STATE = {"step", "model", "average", "optimizer", "identity"}  # what training resumes from has
_LONGEST_QUOTE = 120  # characters
_UNWRITTEN = re.compile(rf"inline_container|os error ({errno.ENOSPC}|{errno.EFBIG}|{errno.EDQUOT})\b")
_RELATIVES = {
    "STARFlow": ("sos_embed", "gate_proj", "proj_txt", "q_norm", "k_norm", "rope", "feature_map"),
    "iTARFlow": ("time", "t_embed", "t_emb", "adaln", "modulation"),
}


class CheckpointError(BundleError, ValueError):
    """A file that is not a TarFlow checkpoint, or is damaged."""


def reference_name(name: str) -> str:
    """The name a parameter of :class:`~tarflow.model.TarFlow` has in the reference's state dict."""
    for pattern, replacement in _RENAME:
        name = pattern.sub(replacement, name)
    return name


def load(path: str | os.PathLike[str], hints: Hints | None = None) -> TarFlow:
    """Read a checkpoint: the reference's ``.pth`` state dict, safetensors, a folder or index of shards, or a bundle.

    What kind a file is tells its content, and keys and prefixes that trainers wrap weights in do not matter. Of raw and
    averaged weights in one file ``hints.weights`` chooses: "ema", "raw" or a key; by default the average is taken, and
    what was found is logged. ``hf:OWNER/REPO/FILE@REVISION`` is fetched from the hub. Returns the model in float32, in
    eval mode, its weights mapped from the file where the format allows. Raises :class:`~tarflow.config.ConfigError`
    naming the hints still needed, InputError for weights that cannot be chosen, :class:`CheckpointError` for damaged,
    foreign or unsafe files, FileNotFoundError if there is nothing at ``path``.
    """
    path, hints = _file_at(checkpoint_at(path)), hints or Hints()
    document, config = _read_shards(path) if path.name.endswith(INDEX) else _read(path)
    _refuse_resume_state(document, path)
    try:
        state = weights_of(document, _FAMILY.pattern, hints.weights, str(path))
    except LookupError as error:
        raise CheckpointError(f"'{path}' is no one state_dict: {error}") from None
    if state is None:
        raise CheckpointError(f"'{path}' is not a state_dict: expected names mapped to tensors")
    state = {name: tensor for name, tensor in state.items() if not _MASK.match(name)}
    if not path.name.endswith(INDEX):  # which names files that safetensors measures
        _must_hold(path, state)
    if config is None:
        _require_core(path, state)
        config, noise_from = infer({name: tuple(tensor.shape) for name, tensor in state.items()}, path.name, hints)
    else:
        config, noise_from = _heed(config, hints, path), CARRIED if hints.noise_std is None else SAID
    model = build(config, state, str(path))
    model.noise_from = noise_from
    return model


def _refuse_resume_state(document: object, path: Path) -> None:
    if isinstance(document, dict) and set(document) == _STATE:
        found = sorted(each.name for kind in ("*.pth", "*.safetensors") for each in path.parent.glob(kind))
        beside = f"the checkpoint beside it, '{path.parent / found[0]}'" if found else "the checkpoint of that run"
        raise CheckpointError(f"'{path}' is the state that training resumes from, not a checkpoint; use {beside}")


def _file_at(path: Path) -> Path:
    """The file to read: in a folder, a bundle's weights or the index of shards."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    if not path.is_dir():
        return path
    files = [path / "weights.safetensors"] if (path / "weights.safetensors").is_file() else [*path.glob(f"*{INDEX}")]
    if len(files) != 1:
        found = f"{len(files)} indices of shards" if files else f"neither weights.safetensors nor an index, *{INDEX}"
        raise CheckpointError(f"'{path}' is a folder with {found}; expected a bundle or a checkpoint")
    return files[0]


def _heed(config: Config, hints: Hints, path: Path) -> Config:
    """The configuration a file carries, with another training noise if one was asked for."""
    said, found = hints.patch_size, config.patch_size
    if said is not None and said != found:
        raise ConfigError(f"`patch_size` {said} contradicts '{path}', which says {found}; drop it", field="patch_size")
    return config if hints.noise_std is None else replace(config, noise_std=parse_noise(hints.noise_std))


def build(config: Config, state: Mapping[str, Tensor], source: str) -> TarFlow:
    """A model from a reference-named state dict. Tensors are adopted, not copied, where they are float32."""
    try:
        with torch.device("meta"):
            model = TarFlow(config)
    except RuntimeError as error:  # a size beyond 64 bits
        raise CheckpointError(f"'{source}' describes no model that there can be ({_first_line(error)})") from None
    wanted = {reference_name(name): name for name in model.state_dict()}
    state = dict(state)
    shapes = {theirs: tuple(model.state_dict()[ours].shape) for theirs, ours in wanted.items()}
    if "var" not in state and config.nvp:
        _compare(source, state, {name: shape for name, shape in shapes.items() if name != "var"})
        _check_image(config, state, source)
        state["var"] = torch.ones(shapes["var"])
    _compare(source, state, shapes)
    model.load_state_dict(
        {ours: state[theirs].detach().float().contiguous() for theirs, ours in wanted.items()}, assign=True
    )
    return model.eval()


def _check_image(config: Config, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse an image that is far larger than the weights of its model: both its sides may fit them, and it not."""
    numbers, weights = config.tokens * config.patch_dim, sum(tensor.numel() for tensor in state.values())
    if numbers > _IMAGE * weights:
        raise CheckpointError(
            f"'{source}' describes images of {numbers} numbers for {weights} weights; that is no model"
        )


def reference_state(model: TarFlow) -> dict[str, Tensor]:
    """The model's weights under the reference's names."""
    return {reference_name(name): tensor.detach() for name, tensor in model.state_dict().items()}


def save(model: TarFlow, path: str | os.PathLike[str]) -> None:
    """Write ``.pth`` (as the reference trainer does, masks included) or ``.safetensors``, atomically."""
    with replacing_by_name(path) as partial:
        write(model, partial, Path(path).suffix)


def write(model: TarFlow, path: Path, suffix: str) -> None:
    """Write a checkpoint of the kind that ``suffix`` names. Raises OSError where the disk is full."""
    state = reference_state(model)
    with writer_errors():
        if suffix == ".safetensors":
            from safetensors.torch import save_file

            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, str(path), {CONFIG_KEY: json.dumps(model.config.to_dict())})
        else:
            mask = torch.tril(torch.ones(model.config.tokens, model.config.tokens))
            state |= {f"blocks.{k}.attn_mask": mask for k in range(model.config.blocks)}
            torch.save(state, path)


@contextlib.contextmanager
def writer_errors() -> Iterator[None]:
    """Say that the disk is full as the system does: PyTorch's zip writer and safetensors have words of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not _UNWRITTEN.search(str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _read_pickle(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):  # PyTorch does not look at the checksums its own files carry
            check_archive(path)
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"'{path}' is damaged: '{damaged}' does not match its checksum; copy it again")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError, OSError, SafetensorError):  # older than the zip format, or named .safetensors
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError, CheckpointError):
        raise
    except Exception as error:  # damage makes torch raise almost anything: struct.error, OSError, IndexError ...
        if isinstance(error, pickle.UnpicklingError) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            if not _is_pickle(path):
                raise CheckpointError(
                    f"'{path}' is no PyTorch checkpoint and no safetensors file; expected weights in one of these"
                ) from None
            raise CheckpointError(
                f"'{path}' holds more than tensors and was not loaded: unpickling it could run code. Expected a "
                "state_dict of tensors; save one with torch.save(model.state_dict(), path)"
            ) from None
        raise CheckpointError(
            f"'{path}' is truncated, damaged or no PyTorch checkpoint ({_first_line(error)}); "
            "copy it again and compare checksums"
        ) from None


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's do, or is a pickle throughout; looked at, never run."""
    with path.open("rb") as file:
        if file.read(2) in (b"PK", b"\x80\x02"):
            return True
        file.seek(0)
        try:
            return all(True for _ in pickletools.genops(file))
        except Exception:  # damage makes it raise almost anything
            return False


def _read_shards(index: Path) -> tuple[dict[str, Tensor], Config | None]:
    """Weights in several files beside an index that says which is where."""
    state: dict[str, Tensor] = {}
    config = None
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
        if strange := [name for name in files if Path(name).name != name]:
            raise ValueError(f"'{strange[0]}' is not the name of a file beside it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{index}' is damaged or no index of shards ({_first_line(error)})") from None
    for name in sorted(files):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"'{index}' names '{name}', which is not beside it; copy all shards")
        part, said = _read(index.parent / name)
        if not isinstance(part, dict):
            raise CheckpointError(f"'{index.parent / name}' is not a state_dict: expected names mapped to tensors")
        state, config = state | part, config or said
    return state, config


def _read(path: Path) -> tuple[object, Config | None]:
    """What a file holds, of the kind that its first bytes show."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")  # of a safetensors header, which is JSON
    safetensors = start[8:] == b"{" and length <= path.stat().st_size - 8
    damaged = path.suffix == ".safetensors" and start[:2] not in (b"PK", b"\x80\x02")  # neither zip nor pickle
    return _read_safetensors(path) if safetensors or damaged else (_read_pickle(path), None)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Config | None]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = _dequantised({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        config = Config(**json.loads(metadata[CONFIG_KEY])) if CONFIG_KEY in metadata else None
        if config is not None and config.blocks * config.layers > len(state):
            raise ValueError(f"{config.blocks} blocks of {config.layers} layers for {len(state)} weights")
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        why = str(error).replace("`", "")  # fields of the file, which nobody gave
        raise CheckpointError(f"'{path}' is truncated, damaged or no safetensors file ({why})") from None
    return {name: tensor for name, tensor in state.items() if not name.startswith(DERIVED)}, config


def _dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an int8 bundle in float32, (out, in). Raises ValueError if their scales are missing or do not fit."""
    for name in [name for name, tensor in state.items() if tensor.dtype == torch.int8]:
        levels, scale = state[name], state.get(f"{DERIVED}{name}{SCALE}")
        if scale is None or levels.dim() != 2 or scale.shape != levels.shape[1:]:
            raise ValueError(f"{name} is int8 without scales for its {tuple(levels.shape)[-1:]} outputs")
        state[name] = (levels.float() * scale).T.contiguous()
    return state


def _must_hold(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that say they are larger than the file: many over one storage, or one stretched."""
    try:
        check_size(sum(tensor.numel() * tensor.element_size() for tensor in state.values()), path)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is no TarFlow checkpoint: {error}") from None


def _require_core(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse files from which not even the configuration can be inferred."""
    core = ("blocks.0.pos_embed", "blocks.0.proj_in.weight", "blocks.0.proj_out.weight")
    missing = [n for n in (*core, "blocks.0.attn_blocks.0.attention.qkv.weight") if n not in state]
    missing += [f"{n} (as a matrix)" for n in core if n in state and state[n].dim() != 2]
    if "blocks.0.class_embed" in state and not state["blocks.0.class_embed"].dim():
        missing += ["blocks.0.class_embed (a row a class)"]
    relative, strange = _relative(state)
    strange = strange or [n for n in sorted(state) if not _is_placed(n, len(state))]
    if missing or strange:
        raise CheckpointError(_foreign(str(path), missing, strange, relative))


def _is_placed(name: str, weights: int) -> bool:
    """Whether a name is the family's, its block and layer numbers plausible: fewer than there are weights."""
    match = _FAMILY.fullmatch(name)
    return match is not None and all(len(n) < 9 and int(n) < weights for n in match.groups() if n)


def _compare(source: str, state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(_foreign(source, missing, extra, _relative(state)[0]))
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"'{source}': {name} has shape {tuple(state[name].shape)}; expected {shape} from the other weights"
            )


def _relative(state: Mapping[str, Tensor]) -> tuple[str | None, list[str]]:
    """A later family that these weights look like, and the names that tell."""
    for family, marks in _RELATIVES.items():
        if names := [name for name in state if any(mark in name.lower() for mark in marks)]:
            return family, names
    return None, []


def _first_line(error: Exception) -> str:
    """What another library says, up to the end of a sentence, or of a word if that one is long."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if len(text) <= _LONGEST_QUOTE:
        return text
    sentences, _, _ = text[:_LONGEST_QUOTE].rpartition(". ")
    return sentences or f"{text[:_LONGEST_QUOTE].rpartition(' ')[0] or text[:_LONGEST_QUOTE]} ..."


def _foreign(source: str, missing: list[str], extra: list[str], relative: str | None) -> str:
    def few(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    message = f"'{source}' is not a TarFlow checkpoint"
    if relative:
        message += f"; it looks like {relative}, a later family with other layers, which is not supported"
    if missing:
        message += f"\n  missing: {few(missing)}"
    if extra:
        message += f"\n  not part of TarFlow: {few(extra)}"
    return message + "\n  expected the state_dict of a model as published with arXiv 2412.06329"
