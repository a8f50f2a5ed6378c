"""Weights on a GPU, once for all graphs of a block: without them every session would bring a copy of its own."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from ..bundle import WEIGHTS, Bundle
from ..graph import Weight, weights_of
from .library import load_onnxruntime
from .memory import DeviceArray, cudart

_TYPES = {1: np.float32, 10: np.float16, 16: np.uint16}  # by ONNX's number; int8 every session packs for itself


class DeviceWeights:
    """Tensors of a bundle's weights file on GPU ``number``, each there while any session uses it. Whoever takes them
    touches the device.
    """

    def __init__(self, bundle: Bundle, number: int) -> None:
        self._bundle, self._number, self._ort = bundle, number, load_onnxruntime()
        self._there: weakref.WeakValueDictionary[tuple[int, Weight], DeviceArray] = weakref.WeakValueDictionary()

    def give(self, options: Any, block: int, graph: str) -> list[Any]:
        """Let the session that is opened with ``options`` take a graph's weights from here. Returns what must be held
        for as long as the session is. Raises MachineError where they do not fit.
        """
        held: list[Any] = []
        if cudart(self._number) is None:
            return held
        for name, weight in weights_of(self._bundle.path(graph)).items():
            kind = _TYPES.get(weight.type)
            if kind is None or math.prod(weight.shape) * np.dtype(kind).itemsize != weight.length:
                continue  # what is not as it is written here, ONNX Runtime reads, or refuses
            array = self._there.get((block, weight))
            if array is None:
                numbers = np.fromfile(self._bundle.path(WEIGHTS), kind, math.prod(weight.shape), offset=weight.start)
                array = self._there[block, weight] = DeviceArray(self._number, numbers.reshape(weight.shape))
            value = self._ort.OrtValue.from_dlpack(array.lent())
            options.add_initializer(name, value)
            held += array, value
        return held
