"""What precision an engine really has: read back, never assumed.

TensorRT computes in the types the graph is written in. A graph that was typed wrongly builds without a word, at a
fraction of the speed. So the types are read from the parsed network, and from the engine where a GPU can load it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...runtime.precision import ENGINE_PRECISIONS

_SPELLED = (  # how the inspector spells the types of a layer's tensors
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("fp16", re.compile(r"half|fp16|float16", re.I)),
    ("fp32", re.compile(r"float|fp32", re.I)),
)
_PRODUCT = re.compile(r"\b(?:Gemm|MatMul)_\d+")  # names of the nodes in our graphs


@dataclass(frozen=True, slots=True)
class Attestation:
    """Precision of an engine's matrix products and cache, and where it was read: "engine" or "network"."""

    products: dict[str, int]  # precision -> how many matrix products have it
    cache: frozenset[str]
    source: str

    @property
    def built(self) -> str:
        """The precision in a word, or several joined by "+" if it is mixed."""
        return "+".join(sorted({*self.products, *self.cache})) or "unknown"

    def mismatch(self, asked: str) -> str | None:
        """What is not as asked, or None."""
        if not self.products:
            return f"no matrix product was found in the {self.source}, so its precision is not known"
        wrong = [f"{count} matrix products in {name}" for name, count in sorted(self.products.items()) if name != asked]
        wrong += [f"a cache in {name}" for name in sorted(self.cache) if name != asked]
        return f"asked {asked}, built {', '.join(wrong)}" if wrong else None


def read_network(trt: Any, network: Any) -> Attestation:
    """From a parsed network, whose types a strongly typed build keeps."""
    products: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type in (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION):
            products[_name(layer.get_output(0).dtype)] += 1
    tensors = (network.get_input(number) for number in range(network.num_inputs))
    cache = frozenset(_name(tensor.dtype) for tensor in tensors if _is_cache(tensor.name))
    return Attestation(dict(products), cache, "network")


def read_engine(trt: Any, engine: Any) -> Attestation:
    """From a deserialised engine: types of its tensors, and of its layers by the inspector."""
    inspector = engine.create_engine_inspector()
    document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    cache = frozenset(_name(engine.get_tensor_dtype(name)) for name in names if _is_cache(name))
    return Attestation(layer_products(document), cache, "engine")


def layer_products(document: dict[str, Any]) -> dict[str, int]:
    """Precision of the layers that compute matrix products, from the inspector's JSON.

    A fused layer names every node it holds. Its precision is the narrowest type among its tensors: products are what
    the graph narrows for.
    """
    products: Counter[str] = Counter()
    for layer in document.get("Layers", ()):
        if not isinstance(layer, dict):  # built without details
            continue
        if not _PRODUCT.search(f"{layer.get('Name', '')} {layer.get('Metadata', '')}"):
            continue
        tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
        spelled = " ".join(str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))) for tensor in tensors)
        spelled += " " + " ".join(str(layer[key]) for key in ("Precision", "WeightsType", "TacticName") if key in layer)
        found = next((name for name, pattern in _SPELLED if pattern.search(spelled)), None)
        if found is not None:
            products[found] += 1
    return dict(products)


def _is_cache(name: str) -> bool:
    return name.startswith(("key_", "value_"))


def _name(dtype: Any) -> str:
    """TensorRT's type in our words."""
    word = getattr(dtype, "name", str(dtype)).rsplit(".", 1)[-1]
    return ENGINE_PRECISIONS.get(word, word.lower())
