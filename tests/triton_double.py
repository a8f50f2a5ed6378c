"""A stand-in for Triton: loads a model repository as the server does, and runs model.py on batches of requests.

It knows the configuration only through Triton's own protobuf schema (of tritonclient), and refuses what Triton would:
tensors that are not declared, of another type or shape, a batch too large, a response missing or of another size.
What runs behind it is the real model.py and the real Flow. It is no proof that Triton itself takes them.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient
from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from numpy.typing import NDArray

# By its file: the package around it wants grpc, which nothing here needs.
SCHEMA = runpy.run_path(str(Path(tritonclient.__path__[0], "grpc", "model_config_pb2.py")))
KINDS = {"TYPE_FP32": np.dtype(np.float32), "TYPE_FP64": np.dtype(np.float64), "TYPE_INT64": np.dtype(np.int64)}


def parsed(config: str) -> Any:
    """A ModelConfig from protobuf's text format."""
    return text_format.Parse(config, SCHEMA["ModelConfig"]())


# --- triton_python_backend_utils, as far as model.py uses it --------------------------------------------------------


class TritonError(Exception):
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TypeError(f"Tensor({type(name).__name__}, {type(array).__name__}); expected a name and a numpy array")
        if not array.flags.c_contiguous:
            raise ValueError(f"tensor {name} is not contiguous")
        self._name, self._array = name, array

    def to_dlpack(self) -> NDArray[Any]:
        return self._array.copy()

    @classmethod
    def from_dlpack(cls, name: str, capsule: NDArray[Any]) -> Tensor:
        return cls(name, capsule)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


@dataclass(frozen=True)
class Request:
    tensors: dict[str, NDArray[Any]]
    wanted: tuple[str, ...]

    def requested_output_names(self) -> list[str]:
        return list(self.wanted)


class InferenceResponse:
    def __init__(
        self,
        output_tensors: Sequence[Tensor],
        error: TritonError | None = None,
        parameters: dict[str, str] | None = None,
    ) -> None:
        if error is not None and not isinstance(error, TritonError):
            raise TypeError(f"error is a {type(error).__name__}; expected TritonError")
        self.tensors, self.error = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error
        self.parameters = parameters or {}


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.tensors[name]) if name in request.tensors else None


# --- the server -----------------------------------------------------------------------------------------------------


class Model:
    """One model of a repository, loaded; call it with requests that are to share a batch."""

    def __init__(self, folder: Path) -> None:
        self.config = parsed((folder / "config.pbtxt").read_text())
        assert self.config.name == folder.name, "Triton refuses a model named unlike its folder"
        assert self.config.backend == "python"
        utils = ModuleType("triton_python_backend_utils")
        for part in (TritonError, Tensor, InferenceResponse, get_input_tensor_by_name):
            setattr(utils, part.__name__, part)
        sys.modules[utils.__name__] = utils
        try:
            self.model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
        finally:
            del sys.modules[utils.__name__]
        (group,) = self.config.instance_group
        text = json.dumps(json_format.MessageToDict(self.config, preserving_proto_field_name=True))
        self.model.initialize(
            {
                "model_config": text,
                "model_instance_kind": "GPU" if group.kind == group.KIND_GPU else "CPU",
                "model_instance_device_id": str(group.gpus[0]) if group.gpus else "0",
            }
        )

    def __call__(self, *requests: dict[str, Any], wanted: tuple[str, ...] | None = None) -> list[dict[str, Any] | str]:
        """One answer a request: outputs by name, or the text of its error."""
        names = wanted or tuple(output.name for output in self.config.output)
        ready = [Request(self._inputs(tensors), names) for tensors in requests]
        rows = [len(next(iter(request.tensors.values()))) for request in ready]
        assert sum(rows) <= self.config.max_batch_size, "Triton makes no larger batch"
        responses = self.model.execute(ready)
        self.said = [response.parameters for response in responses]
        assert len(responses) == len(requests)
        return [self._answer(response, n, names) for response, n in zip(responses, rows, strict=True)]

    def _inputs(self, tensors: dict[str, Any]) -> dict[str, NDArray[Any]]:
        declared = {spec.name: spec for spec in self.config.input}
        assert tensors.keys() <= declared.keys(), "Triton refuses an input that is not declared"
        missing = {name for name, spec in declared.items() if not spec.optional} - tensors.keys()
        assert not missing, f"Triton refuses a request without {missing}"
        return {name: self._checked(declared[name], np.asarray(array)) for name, array in tensors.items()}

    def _answer(self, response: InferenceResponse, rows: int, names: tuple[str, ...]) -> dict[str, Any] | str:
        if response.error is not None:
            return str(response.error)
        declared = {spec.name: spec for spec in self.config.output}
        assert set(response.tensors) == set(names), "exactly the outputs that were asked for"
        for name, array in response.tensors.items():
            assert len(self._checked(declared[name], array)) == rows
        return response.tensors

    def _checked(self, spec: Any, array: NDArray[Any]) -> NDArray[Any]:
        kind = KINDS[SCHEMA["DataType"].Name(spec.data_type)]
        assert array.dtype == kind, f"{spec.name} is {array.dtype}, declared {kind}"
        assert array.shape[1:] == tuple(spec.dims), f"{spec.name} is (N, {array.shape[1:]}), declared {spec.dims}"
        return array
