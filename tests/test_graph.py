"""A stranger's graph reads the weights file alone, and computes with what exports write; in Python and in C++."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from bench.weights import random_model
from tarflow import checkpoint
from tarflow.config import Config
from tarflow.export.comparison import Comparison, verify_bundle
from tarflow.export.pipeline import export
from tarflow.runtime.bundle import FUSED, GOLDEN, MANIFEST, WEIGHTS, Bundle
from tarflow.runtime.errors import BundleError
from tarflow.runtime.flow import Flow
from tarflow.runtime.graph import check_graph, operators, weights_of

from .conftest import DEMO, Exported, amend
from .cpp_library import BUNDLE, CppError, CppFlow

STEP = "block_00.step.onnx"
EXPORTS = [
    *(("demo", "fp32"), ("cond", "fp32"), ("uncond", "fp32"), ("vp", "fp32")),
    *(("demo", "fp16"), ("uncond", "bf16"), ("demo", "int8")),
]
Change = Callable[[ModelProto], object]


def nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, of sub-graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes(inner)


def test_the_list_of_operators_is_what_exports_write_and_nothing_else(bundle: Exported, tmp_path: Path) -> None:
    larger = Config(image_size=32, channels=1, patch_size=2, width=64, blocks=1, layers=1, noise_std=0.1)
    checkpoint.save(random_model(larger), tmp_path / "larger.safetensors")
    export(tmp_path / "larger.safetensors", tmp_path / "larger", check=False)  # masks its attention by a node
    found = set()
    for folder in (tmp_path / "larger", *(bundle(case, engine) for case, engine in EXPORTS)):
        opened = Bundle.open(folder)
        opened.check_graphs()
        for block in opened.manifest.blocks:
            for kind, name in block.graphs.items():
                model = onnx.load(opened.path(name), load_external_data=False)
                assert not model.functions
                own = {"", "com.microsoft"} if kind in FUSED.values() else {""}
                assert {entry.domain for entry in model.opset_import} == own
                found |= {f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in nodes(model.graph)}
    assert found == operators()


def test_the_list_is_sorted_and_in_the_package() -> None:
    import tarflow.runtime.graph as module

    lines = (Path(module.__file__).parent / "operators.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == sorted(operators())


def a_tensor(model: ModelProto) -> TensorProto:
    """One whose numbers are in the weights file."""
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    return found


def place(key: str, value: str) -> Change:
    """Say another thing about where a tensor's numbers are."""

    def change(model: ModelProto) -> None:
        said = {entry.key: entry for entry in a_tensor(model).external_data}
        (said.get(key) or a_tensor(model).external_data.add(key=key)).value = value

    return change


def again(key: str, value: str) -> Change:
    return lambda model: a_tensor(model).external_data.add(key=key, value=value)


def foreign(domain: str, name: str) -> NodeProto:
    return helper.make_node(name, [], ["unused"], domain=domain)


def inside(model: ModelProto, node: NodeProto) -> None:
    """A node in a sub-graph of a node that is fine itself."""
    graph = helper.make_graph([node], "inner", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", graph))


def function(node: NodeProto) -> onnx.FunctionProto:
    return helper.make_function("", "Add", [], [], [node], [helper.make_opsetid("", 20)])


def sparse(location: str) -> onnx.SparseTensorProto:
    values = TensorProto(data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value=location)
    return onnx.SparseTensorProto(values=values)


REFUSED: dict[str, tuple[Change, str]] = {
    "weights in a folder": (place("location", "plans/w.bin"), "reads weights from 'plans/w.bin'"),
    "golden pairs as weights": (place("location", GOLDEN), "reads weights from 'golden.safetensors'"),
    "memory as weights": (place("location", "*/_ORT_MEM_ADDR_/*"), "reads weights from"),
    "another way there": (place("location", f"./{WEIGHTS}"), "reads weights from"),
    "said twice": (again("location", WEIGHTS), "once each"),
    "packed elsewhere": (again("prepacked_0", "x"), "once each"),
    "behind the end": (place("offset", str(DEMO.joinpath(WEIGHTS).stat().st_size)), "which has"),
    "longer than the file": (place("length", "9" * 18), "which has"),
    "before the beginning": (place("offset", "-8"), "expected"),
    "a sparse tensor": (lambda model: model.graph.sparse_initializer.append(sparse("x")), "reads weights from 'x'"),
    "another operator": (lambda model: model.graph.node.append(foreign("", "Loop")), "computes with 'ai.onnx:Loop'"),
    "another domain": (lambda model: model.graph.node.append(foreign("com.microsoft", "Gelu")), "'com.microsoft:Gelu'"),
    "a sub-graph": (lambda model: inside(model, foreign("", "If")), "computes with 'ai.onnx:If'"),
    "a function": (lambda model: model.functions.append(function(foreign("x", "Add"))), "computes with 'x:Add'"),
    "an opset": (lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)), "domain 'ai.onnx.ml'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_graph_that_does_more_is_refused_in_both_languages(kind: str, copy: Exported) -> None:
    change, words = REFUSED[kind]
    folder = copy("demo")
    model = onnx.load(folder / STEP, load_external_data=False)
    change(model)
    (folder / STEP).write_bytes(model.SerializeToString())
    amend(folder, STEP)
    (folder / "plans").mkdir()
    shutil.copy(folder / WEIGHTS, folder / "plans" / "w.bin")
    with pytest.raises(BundleError, match=STEP) as python:
        Flow.open(folder)
    assert words in str(python.value)
    with pytest.raises(BundleError, match=STEP):
        verify_bundle(Comparison(folder))
    with pytest.raises(CppError, match=STEP) as cpp:
        CppFlow(folder)
    assert words in str(cpp.value)
    assert cpp.value.status == BUNDLE


@pytest.mark.parametrize("name", ["graphs/step.onnx", "step.ort"])
def test_a_graph_is_an_onnx_file_beside_the_weights(name: str, copy: Exported) -> None:
    """In a folder it would find other weights; by another name ONNX Runtime takes it for another format."""
    folder = copy("demo")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / STEP).rename(folder / name)
    text = (folder / MANIFEST).read_text().replace(STEP, name)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"expected an \.onnx file beside the weights"):
        Flow.open(folder)
    with pytest.raises(CppError, match=r"expected an \.onnx file beside the weights"):
        CppFlow(folder)


@pytest.mark.parametrize("kind", ["forward", "resident"])
def test_weights_are_found_where_a_graph_says_they_are(kind: str) -> None:
    path, said = DEMO / f"block_01.{kind}.onnx", {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            said[tensor.name] = tensor.data_type, tuple(tensor.dims), int(place["offset"]), int(place["length"])
    assert weights_of(path) == said
    assert len(said) > 40


def test_a_graph_beyond_any_exports_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.onnx").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(BundleError, match="expected a graph of 268435456 at most"):
        check_graph(tmp_path / "x.onnx", 1)


def test_nesting_and_numbers_of_fields_are_bounded_without_recursion(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    deep = b""
    for _ in range(3000):  # protobuf's own readers end at 100
        deep = field(1, field(4, b"Add") + field(5, field(6, deep)))
    path = tmp_path / "x.onnx"
    path.write_bytes(field(7, deep))
    check_graph(path, 0)
    path.write_bytes(field(7, field(5, b"") * 300_000))
    with pytest.raises(BundleError, match="too many fields"):
        check_graph(path, 0)


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(-1, 7))
@settings(max_examples=200, deadline=None)
def test_a_graph_cut_anywhere_or_with_any_bit_flipped_is_taken_or_refused(
    share: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((DEMO / STEP).read_bytes())
    at = int(share * len(content))
    if bit < 0:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.onnx"
    path.write_bytes(content)
    said = "'"
    try:
        check_graph(path, (DEMO / WEIGHTS).stat().st_size)
    except BundleError as refused:
        said = str(refused)
    assert said[0] == "'"
    assert len(said) < 600
