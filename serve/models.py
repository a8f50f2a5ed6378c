"""The three models of the inference protocol over one flow: sample, encode, denoise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ..runtime import noise
from ..runtime.errors import InputError
from ..runtime.inputs import AMBIGUOUS, AS_THEY_ARE, check_bounded, check_labels, check_strength, is_ambiguous
from ..runtime.request import Resolved
from ..runtime.samples import Progress, nonfinite
from .batcher import Drawn, OnProgress
from .drawing import Drawing, request_of
from .packing import ranges
from .protocol import Asked, datatype_of
from .service import Refusal, Service, validation_message

VERSION = "1"
_ROWS = 16  # images encoded at once, and between two looks at whether anybody still waits
CERTIFIED = {"certificate", "log_prob"}  # outputs that are there for whoever names one of them
OPTIONAL = {"optional": True}
_SAID = tuple(name for name in Drawing.model_fields if name not in ("labels", "certify", "format", "zoom"))
_NUMBERS = {
    "n": "INT64", "seed": "UINT64", "first_sample": "UINT64", "guidance": "FP32", "attention_temperature": "FP32",
    "denoise": "FP32", "annealed": "BOOL",
}  # fmt: skip
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a model's metadata; -1 in a shape is any size. One that is OPTIONAL may be left out."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """What goes in and comes out; ``parameters`` may be said in the request as well as in tensors of one number."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[str, ...]

    def check(self, asked: Asked) -> None:
        """Raise Refusal for tensors, parameters and outputs this model does not have, or of another type or shape."""
        known = {tensor.name: tensor for tensor in self.inputs}
        for name, array in asked.tensors.items():
            if name not in known:
                raise Refusal(400, f"model {self.name} has no input '{name}'; expected {', '.join(known)}")
            spec = known[name]
            if datatype_of(array) != spec.datatype or not _fits(array.shape, spec.shape):
                raise Refusal(
                    400, f"input '{name}' is {datatype_of(array)} {list(array.shape)}; expected {spec.datatype} "
                    f"{list(spec.shape)}, where -1 is any size",
                )  # fmt: skip
            if name in asked.parameters:
                raise Refusal(400, f"'{name}' is given as a tensor and as a parameter; drop one of the two")
        for tensor in self.inputs:
            if tensor.parameters != OPTIONAL and tensor.name not in asked.tensors:
                raise Refusal(400, f"model {self.name} needs input '{tensor.name}'")
        for name in asked.parameters:
            if name not in self.parameters:
                raise Refusal(400, f"parameter '{name}' is unknown; expected {', '.join(self.parameters)}")
        have = [tensor.name for tensor in self.outputs]
        for name in asked.outputs or ():
            if name not in have:
                raise Refusal(400, f"model {self.name} has no output '{name}'; expected {', '.join(have)}")

    def wanted(self, asked: Asked) -> dict[str, bool]:
        """Outputs to return, and whether each goes binary. Unasked: all but CERTIFIED, which cost a pass."""
        if asked.outputs is not None:
            return dict(asked.outputs)
        return {tensor.name: asked.binary for tensor in self.outputs if tensor.name not in CERTIFIED}


def models_of(service: Service) -> dict[str, Model]:
    """The models, with the shapes of this service's bundle."""
    config = service.flow.config
    images = (-1, *config.image)
    labels = Tensor("labels", "INT64", (-1,), OPTIONAL)
    numbers = {name: Tensor(name, datatype, (1,), OPTIONAL) for name, datatype in _NUMBERS.items()}
    seeds = numbers["seed"], numbers["first_sample"]
    sample = Model(
        "sample",
        (labels, *numbers.values()),
        (
            Tensor("images", "FP32", images),
            Tensor("finite", "BOOL", (-1,)),
            Tensor("certificate", "FP32", (-1,)),
            Tensor("log_prob", "FP64", (-1,)),
        ),
        _SAID,
    )
    encode = Model(
        "encode",
        (Tensor("images", "FP32", images, OPTIONAL), Tensor("pixels", "UINT8", images, OPTIONAL), labels, *seeds),
        (
            Tensor("latent", "FP32", (-1, config.tokens, config.patch_dim)),
            *(Tensor(name, "FP32", (-1,)) for name in ("log_det", "bits_per_dim", "log_likelihood")),
        ),
        ("seed", "first_sample"),
    )
    denoise = Model(
        "denoise",
        (Tensor("images", "FP32", images), labels, Tensor("strength", "FP32", (1,), OPTIONAL)),
        (Tensor("images", "FP32", images), Tensor("finite", "BOOL", (-1,))),
        ("strength",),
    )
    return {model.name: model for model in (sample, encode, denoise)}


def wanted_of(service: Service, model: Model, asked: Asked) -> Resolved:
    """What a request to the model ``sample`` wants drawn. Raises Refusal and InputError."""
    said = dict(asked.parameters)
    for name, tensor in asked.tensors.items():
        said[name] = tensor.tolist() if name == "labels" else tensor[0].item()
    if said.get("labels") == []:
        raise Refusal(400, "labels is empty; expected one label a sample")
    if isinstance(said.get("labels"), list) and len(said["labels"]) == 1 and "n" in said:
        said["labels"] = said["labels"][0]
    try:
        drawing = Drawing(certify=not CERTIFIED.isdisjoint(model.wanted(asked)), **said)
    except ValidationError as error:
        raise Refusal(400, validation_message(error.errors())) from None
    return request_of(service, drawing)


def drawn_tensors(drawn: Drawn) -> tuple[Tensors, dict[str, Any]]:
    """Output tensors of ``sample``, and parameters of the answer."""
    tensors: Tensors = {"images": drawn.images, "finite": _finite(drawn.images)}
    if drawn.certificate is not None and drawn.log_prob is not None:
        tensors |= {"certificate": drawn.certificate, "log_prob": drawn.log_prob}
    request = drawn.request
    said = {"nonfinite": ranges(drawn.nonfinite), "seed": request.seed, "first_sample": request.first_sample}
    checked = {"suspects": ranges(drawn.suspects), "density": drawn.density}
    return tensors, said | (checked if drawn.certificate is not None else {})


def encoding(service: Service, asked: Asked) -> Callable[[OnProgress], Tensors]:
    """The work of ``encode``, inputs checked. Raises Refusal and InputError, the work too: for images that overflow."""
    flow, tensors = service.flow, asked.tensors
    if ("images" in tensors) == ("pixels" in tensors):
        raise Refusal(400, "expected either images, FP32 in [-1, 1], or pixels, UINT8, which are dequantised by seed")
    images, labels = _images(service, tensors, "images" if "images" in tensors else "pixels")
    seed, first = (_number(asked, name, 0) for name in ("seed", "first_sample"))
    if "images" in tensors and (seed or first):
        raise Refusal(400, "seed and first_sample choose the noise that pixels are dequantised with; images take none")
    noise.check(seed, (first, first + len(images) - 1))

    def work(progress: OnProgress) -> Tensors:
        parts = []
        for rows in _parts(len(images), progress):
            part = images[rows]
            if part.dtype == np.uint8:
                part = flow.dequantise(part, seed, first + rows.start)
            parts.append(flow.encode(part, labels[rows], AS_THEY_ARE))
        latent, log_det = (np.concatenate(part) for part in zip(*parts, strict=True))
        bits = flow.bits_of(latent, log_det)
        if broken := nonfinite(latent, log_det, bits):
            raise InputError(f"images {ranges(broken)} have no finite likelihood: they are nothing like the model's")
        return {"latent": latent, "log_det": log_det, "bits_per_dim": bits, "log_likelihood": flow.nats_of(bits)}

    return work


def denoising(service: Service, asked: Asked) -> Callable[[OnProgress], Tensors]:
    """The work of ``denoise``, inputs checked. Raises Refusal and InputError."""
    flow = service.flow
    images, labels = _images(service, asked.tensors, "images")
    strength = _number(asked, "strength", 1.0)
    check_strength(flow.config, strength, "strength")

    def work(progress: OnProgress) -> Tensors:
        parts = _parts(len(images), progress)
        denoised = np.concatenate([flow.denoise(images[k], labels[k], strength, AS_THEY_ARE) for k in parts])
        return {"images": denoised, "finite": _finite(denoised)}

    return work


def said_of(asked: Asked) -> dict[str, Any]:
    """Parameters of the answer to ``encode`` and ``denoise``: a warning, where it may not be what was meant."""
    images = asked.tensors.get("images")
    return {"warning": f"images: {AMBIGUOUS}"} if images is not None and is_ambiguous(images) else {}


def _finite(images: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.isfinite(images).all((1, 2, 3)))


def _parts(count: int, progress: OnProgress) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        progress(Progress(start, count, -1, 0))
        yield slice(start, start + _ROWS)


def _images(service: Service, tensors: Mapping[str, NDArray[Any]], name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Images, finite, of pictures' values and not too many, and a label for each; one label stands for all."""
    images, labels = tensors[name], tensors.get("labels")
    most = service.settings.largest_n
    if not 0 < len(images) <= most:
        raise Refusal(400, f"input '{name}' holds {len(images)} images; expected 1 to {most}")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise Refusal(400, f"input '{name}' is not finite")
    if images.dtype.kind == "f":
        check_bounded(images)
    given = labels[0] if labels is not None and len(labels) == 1 else labels
    return images, check_labels(service.flow.config, given, len(images))


def _number(asked: Asked, name: str, default: Any) -> Any:
    """A tensor of one number, or a parameter, of the default's type."""
    if name in asked.tensors:
        return asked.tensors[name][0].item()
    value = asked.parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, type(default))):
        raise InputError(f"parameter '{name}' is no {'integer' if isinstance(default, int) else 'number'}")
    try:
        return type(default)(value)
    except OverflowError:
        raise InputError(f"parameter '{name}' is larger than any number of its type") from None


def _fits(shape: tuple[int, ...], spec: tuple[int, ...]) -> bool:
    return len(shape) == len(spec) and all(want in (-1, have) for have, want in zip(shape, spec, strict=True))
