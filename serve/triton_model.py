"""The model that Triton's Python backend runs: requests in, a Flow's results out. Repositories' model.py imports it.

Rows of all requests Triton hands over are computed together. Each row's result is a function of that row alone:
everything runs in tiles of 16 rows, whoever shares them. That neither place nor mates in a tile matter is measured when
the model is loaded; on an engine where they do, each row has a tile of its own. A request that cannot be answered fails
alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # exists inside Triton only
from numpy.typing import NDArray

from ..runtime.backend import REPRODUCIBLE_TILE, pad_rows
from ..runtime.bundle import Bundle
from ..runtime.errors import BundleError, InputError, MachineError, TarflowError
from ..runtime.flow import Flow
from ..runtime.guidance import Guidance
from ..runtime.image import unpatchify
from ..runtime.inputs import AMBIGUOUS, AS_THEY_ARE, check_bounded, check_labels, is_ambiguous
from ..runtime.machine import cores_each
from ..runtime.opening import Opening
from ..runtime.samples import nonfinite
from .words import http_words

Rows = dict[str, NDArray[Any]]  # tensors by name, first dimension samples
_CHECKED = {"certificate", "log_prob"}  # outputs that cost an encoding, and of which some may not be finite
_MOST_ROWS = 20  # named in an error


class TritonPythonModel:
    """One instance; Triton calls :meth:`initialize` once, then :meth:`execute` with a batch of requests at a time."""

    bundle: Path  # said by a repository's model.py

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, whose hash is in the configuration, and run a tile through it.

        Raises MachineError where this Triton would answer with empty tensors, BundleError for another bundle.
        """
        _check_tensors()
        said = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        on_gpu = args["model_instance_kind"] == "GPU"  # before anything loads CUDA: what this process may see, or none
        os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"] if on_gpu else ""
        bundle = Bundle.open(self.bundle)
        if bundle.hash != said["bundle_sha256"]:
            raise BundleError(
                f"'{bundle.folder}' is the bundle {bundle.hash[:16]}..., but config.pbtxt was written for "
                f"{said['bundle_sha256'][:16]}...; package the bundle again"
            )
        share = cores_each(int(said["instances"]))
        threads = share if said["threads"] == "share" else int(said["threads"])
        self.shares = True
        self.flow = Flow.open(bundle, Opening(said["provider"], threads, spinning=False))
        self.run: Callable[[Rows, bool], Rows] = getattr(self, f"_{said['task']}")
        self.names = [tensor["name"] for tensor in json.loads(args["model_config"])["input"]]
        self.run(self._checked(self._example()), True)  # what cannot work here fails now, not at the first request
        self.shares = self._rows_are_independent()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in order; an error of one is its own."""
        certified = any(not _CHECKED.isdisjoint(request.requested_output_names()) for request in requests)
        read = [self._read(request) for request in requests]
        good = [rows for rows in read if not isinstance(rows, TarflowError)]
        found = iter(self._answers(good, certified) if good else ())
        answers = [rows if isinstance(rows, TarflowError) else next(found) for rows in read]
        return [_response(*each) for each in zip(requests, answers, map(_warning, read), strict=True)]

    def _answers(self, requests: list[Rows], certified: bool) -> list[Rows | TarflowError]:
        """All requests computed together; if the engine fails on them, each by itself: the guilty one fails alone."""
        together = {name: np.concatenate([rows[name] for rows in requests]) for name in requests[0]}
        try:
            found = self.run(together, certified)
        except TarflowError as error:
            if len(requests) == 1:
                return [error]
            return [answer for rows in requests for answer in self._answers([rows], certified)]
        ends = np.cumsum([len(rows["label"]) for rows in requests])[:-1]
        parts = {name: np.split(array, ends) for name, array in found.items()}
        return [_finite({name: arrays[i] for name, arrays in parts.items()}) for i in range(len(requests))]

    # --- the three tasks: rows in, rows out ---------------------------------------------------------------------

    def _sample(self, rows: Rows, certified: bool) -> Rows:
        z = self.flow.noise(rows["seed"].tolist(), rows["index"].tolist())
        images = np.empty((len(z), *self.flow.config.image), np.float32)
        certificate, log_prob = np.zeros((len(z), 1), np.float32), np.zeros((len(z), 1), np.float64)
        for where in self._batches(rows["guidance"]):
            drawn = self.flow.sample(
                noise=z[where],
                labels=rows["label"][where],
                guidance=Guidance(float(rows["guidance"][where[0]])),
                reproducible=True,
                certify=certified,
            )
            images[where] = drawn
            if drawn.certificate is not None and drawn.log_prob is not None:
                certificate[where, 0], log_prob[where, 0] = drawn.certificate, drawn.log_prob
        return {"images": images, "certificate": certificate, "log_prob": log_prob}

    def _encode(self, rows: Rows, _: bool) -> Rows:
        count, config = len(rows["label"]), self.flow.config
        latent = np.empty((count, config.tokens, config.patch_dim), np.float32)
        log_det = np.empty(count, np.float32)
        for where in self._tiles(np.zeros(count)):
            x, labels = (pad_rows(rows[name][where], REPRODUCIBLE_TILE) for name in ("images", "label"))
            latent[where], log_det[where] = (found[: len(where)] for found in self.flow.encode(x, labels, AS_THEY_ARE))
        bits = self.flow.bits_of(latent, log_det)
        return {"latent": latent, "log_det": log_det[:, None], "bits_per_dim": bits[:, None]}

    def _denoise(self, rows: Rows, _: bool) -> Rows:
        images = np.empty_like(rows["images"])
        for where in self._tiles(rows["strength"]):
            x, labels = (pad_rows(rows[name][where], REPRODUCIBLE_TILE) for name in ("images", "label"))
            images[where] = self.flow.denoise(x, labels, float(rows["strength"][where[0]]), AS_THEY_ARE)[: len(where)]
        return {"images": images}

    def _batches(self, alike: NDArray[Any]) -> list[NDArray[np.intp]]:
        """Which rows are computed together: those with the same number in ``alike``, or each by itself."""
        if not self.shares:
            return [np.array([row]) for row in range(len(alike))]
        return [np.flatnonzero(alike == value) for value in np.unique(alike)]

    def _tiles(self, alike: NDArray[Any]) -> list[NDArray[np.intp]]:
        """Batches of at most 16 rows, for what Flow does not tile itself."""
        starts = range(0, len(alike), REPRODUCIBLE_TILE)
        return [where[i : i + REPRODUCIBLE_TILE] for where in self._batches(alike) for i in starts if i < len(where)]

    def _rows_are_independent(self) -> bool:
        """Whether rows have the same bits in any place of a tile, whoever is in the others, on this engine."""
        one = self._checked(self._example())
        rows = {name: np.repeat(array, REPRODUCIBLE_TILE, 0) for name, array in one.items()}
        if "index" in rows:
            rows["index"] = np.arange(REPRODUCIBLE_TILE)
        else:
            noise = self.flow.noise(0, range(REPRODUCIBLE_TILE))
            rows["images"] = unpatchify(noise, self.flow.config.patch_size, self.flow.config.channels)
        order = np.roll(np.arange(REPRODUCIBLE_TILE), 5)[:-3]  # other places, other mates
        cases = [rows]
        if "guidance" in rows and self.flow.config.classes:
            cases.append(rows | {"guidance": np.ones_like(rows["guidance"])})
        return all(self._moves_unchanged(case, order) for case in cases)

    def _moves_unchanged(self, rows: Rows, order: NDArray[np.intp]) -> bool:
        whole, moved = self.run(rows, True), self.run({name: array[order] for name, array in rows.items()}, True)
        return all(np.array_equal(whole[name][order], moved[name]) for name in whole)

    # --- what a request says, checked by itself -----------------------------------------------------------------

    def _read(self, request: Any) -> Rows | TarflowError:
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self.names}
        try:
            return self._checked({name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None})
        except TarflowError as error:
            return error

    def _checked(self, rows: Rows) -> Rows:
        """The rows with every optional tensor there, numbers flat. Raises InputError for what no row may hold."""
        count = len(next(iter(rows.values())))
        default = {"label": np.int64(-1), "guidance": np.float32(0), "strength": np.float32(1)}
        full: Rows = {name: np.full((count, 1), default[name]) for name in self.names if name not in rows} | rows
        for name in full.keys() - {"images"}:
            full[name] = full[name].reshape(count)
        for name in ("seed", "index"):
            if name in full and (full[name] < 0).any():
                raise InputError(f"{name} is {full[name].min()}; expected 0 or more")
        label = check_labels(self.flow.config, full["label"], count)
        for name in ("guidance", "strength"):
            if name in full and not ((full[name] >= 0) & (full[name] < math.inf)).all():
                raise InputError(f"{name} holds {full[name].tolist()}; expected numbers of 0 or more")
        if "guidance" in full and ((full["guidance"] > 0) & (label < 0)).any():
            raise InputError("guidance does nothing for samples without a label: give labels, or guidance 0")
        if "images" in full:
            if not np.isfinite(full["images"]).all():
                raise InputError("images hold numbers that are not finite; expected floats in [-1, 1]")
            check_bounded(full["images"])
        return full

    def _example(self) -> Rows:
        """One row of every tensor."""
        shapes = {"images": self.flow.config.image}
        kinds = {"seed": np.int64, "index": np.int64, "label": np.int64}
        rows = {name: np.zeros((1, *shapes.get(name, (1,))), kinds.get(name, np.float32)) for name in self.names}
        return rows | {"label": np.full((1, 1), min(self.flow.config.classes, 1) - 1, np.int64)}


def _check_tensors() -> None:
    """Raise MachineError if an array that becomes Triton's tensor is not the same when Triton hands it on.

    Backends compiled for NumPy 1 (Triton up to 2.51) misread NumPy 2's items as having no bytes, without a word.
    """
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = triton.Tensor.from_dlpack("copy", triton.Tensor("images", array).to_dlpack()).as_numpy()
    if not np.array_equal(found, array):
        raise MachineError(
            f"this Triton cannot read arrays of NumPy {np.__version__}, so it would answer with empty tensors; in its "
            "Python install NumPy 1: pip install 'numpy<2', or run a Triton newer than 2.51"
        )


def _finite(found: Rows) -> Rows | TarflowError:
    """Results, or the error that they are where some are not finite: no output says which."""
    broken = nonfinite(*(array for name, array in found.items() if name not in _CHECKED))
    if not broken:
        return found
    rows = ", ".join(map(str, broken[:_MOST_ROWS])) + (", ..." if len(broken) > _MOST_ROWS else "")
    return InputError(f"rows {rows} come to nothing finite: guide less, or give images like the model's")


def _warning(rows: Rows | TarflowError) -> str | None:
    """What is to be said of a request's images beside their results."""
    doubtful = not isinstance(rows, TarflowError) and "images" in rows and is_ambiguous(rows["images"])
    return f"images: {AMBIGUOUS}" if doubtful else None


def _response(request: Any, answer: Rows | TarflowError, warning: str | None) -> Any:
    if isinstance(answer, TarflowError):
        kind = triton.TritonError.INVALID_ARG if isinstance(answer, InputError) else triton.TritonError.INTERNAL
        error = triton.TritonError(http_words(answer, labels="label"), kind)
        return triton.InferenceResponse(output_tensors=[], error=error)
    wanted = [name for name in answer if name in request.requested_output_names()]
    tensors = [triton.Tensor(name, np.ascontiguousarray(answer[name])) for name in wanted]
    if warning is not None:
        try:
            return triton.InferenceResponse(output_tensors=tensors, parameters={"warning": warning})
        except TypeError:  # a Triton whose answers have no parameters
            triton.Logger.log_warn(warning)
    return triton.InferenceResponse(output_tensors=tensors)
