"""Every name of TensorRT and CUDA that the code uses exists: in TensorRT 11.4's bindings, TensorRT-RTX, cuda-python."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from polygraphy.backend.trt import CreateConfig

from tarflow.export.engines.target import capability_name
from tarflow.runtime.precision import ENGINE_PRECISIONS

from .conftest import python
from .device_double import DoubleContext, DoubleCuda, DoubleEngine, DoubleRuntime, DoubleTensorRT

ROOT = Path(__file__).parent.parent
RTX_ONLY = {"ComputeCapability", "set_compute_capability", "num_compute_capabilities"}  # behind a check of the package
RTX_ONLY |= {"DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy"}
VARIABLES = {"engine": "ICudaEngine", "context": "IExecutionContext", "runtime": "Runtime", "_runtime": "Runtime"}
VARIABLES |= {"builder": "Builder", "config": "IBuilderConfig", "cache": "ITimingCache", "parser": "OnnxParser"}
VARIABLES |= {"network": "INetworkDefinition", "layer": "ILayer", "tensor": "ITensor", "e": "ParserError"}
VARIABLES |= {"inspector": "EngineInspector", "runtime_config": "IRuntimeConfig"}
# Files that speak to TensorRT, and which of those variables are TensorRT's in them.
FILES = {
    "runtime/tensorrt/library.py": "",
    "runtime/tensorrt/engines.py": "engine context _runtime runtime_config",
    "runtime/tensorrt/resident.py": "engine",
    "export/engines/target.py": "",
    "export/engines/network.py": "network parser builder config runtime e cache",
    "export/engines/progress.py": "",
    "export/engines/build.py": "config",
    "export/engines/layers.py": "network layer engine inspector tensor",
    "export/engines/check.py": "parser builder network config",
}
OURS = {"exists", "get"}  # members of our own, on variables of these names
# Names that a text reaches: what every getattr and hasattr of those files may ask for.
BY_TEXT = {
    "getattr(self._trt.DataType, str(PRECISIONS[self.record.precision].tensorrt))": {
        ("DataType", name) for name in ENGINE_PRECISIONS
    },
    "hasattr(trt, 'Builder')": {("", "Builder")},
    "hasattr(trt.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED')": set(),  # gone in 11, asked for in 10
    "getattr(trt.ComputeCapability, capability_name(capability))": {
        ("ComputeCapability", capability_name(one)) for one in ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    },
    "getattr(dtype, 'name', str(dtype))": {("DataType", name) for name in ENGINE_PRECISIONS},
}
# What Polygraphy does with the arguments of CreateConfig.
BY_POLYGRAPHY = {
    "profiles": {
        ("Builder", "create_optimization_profile"),
        ("IOptimizationProfile", "set_shape"),
        ("IBuilderConfig", "add_optimization_profile"),
    },
    "tf32": {("BuilderFlag", "TF32"), ("IBuilderConfig", "clear_flag")},
    "profiling_verbosity": {("IBuilderConfig", "profiling_verbosity")},
    "builder_optimization_level": {("IBuilderConfig", "builder_optimization_level")},
    "load_timing_cache": {("IBuilderConfig", "create_timing_cache"), ("IBuilderConfig", "set_timing_cache")},
}
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
SYMBOLS = """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getPluginRegistry
    getBuilderPluginRegistry createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion
    initLibNvInferPlugins"""
DUMP = (
    "import json, importlib, sys\nm = importlib.import_module(sys.argv[1])\n"
    "print(json.dumps([m.__version__, {n: dir(getattr(m, n)) for n in dir(m)}]))"
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """package -> name -> its members. The bindings load their libraries on import: empty ones will do for names."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS.split()))
    for library in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "empty.c"]
        subprocess.run(command, cwd=folder, check=True)
    found = {}
    for package, version in (("tensorrt_bindings", "11.4."), ("tensorrt_rtx", "")):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)} if version else None
        done = python("-c", DUMP, package, env=environment)
        assert done.returncode == 0, done.stderr
        said, found[package] = json.loads(done.stdout)
        assert said.startswith(version)
    return found


def chain(node: ast.expr) -> list[str]:
    """``a.b.c`` -> [a, b, c]; of a call or an index, what it hangs on is not followed."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else parts


def attributes(file: str) -> list[list[str]]:
    tree = ast.parse((ROOT / file).read_text())
    return [chain(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def used() -> set[tuple[str, str]]:
    """(class or "", member) of TensorRT that the code uses."""
    found: set[tuple[str, str]] = set()
    for file, variables in FILES.items():
        for parts in attributes(file):
            for module in ("trt", "_trt"):
                if module in parts[:-1]:
                    rest = parts[parts.index(module) + 1 :]
                    found.add(("", rest[0]))
                    if len(rest) > 1 and not rest[1].startswith("__"):
                        found.add((rest[0], rest[1]))
            for variable in variables.split():
                if variable in parts[:-1] and parts[0] in (variable, "self", "parsed"):
                    member = parts[parts.index(variable) + 1]
                    if member not in OURS:
                        found.add((VARIABLES[variable], member))
    return found


def calls(file: str, *names: str) -> list[ast.Call]:
    """Calls of a function that has one of these names."""
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    found = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call for call in found if isinstance(call.func, ast.Name) and call.func.id in names]


def test_names_that_only_a_text_or_polygraphy_reaches_are_listed_here() -> None:
    reached = {ast.unparse(call) for file in FILES for call in calls(file, "getattr", "hasattr")}
    assert reached == BY_TEXT.keys(), "a name is asked for by a text that is not checked here"
    (call,) = calls("export/engines/network.py", "CreateConfig")
    arguments = {keyword.arg for keyword in call.keywords}
    assert arguments == BY_POLYGRAPHY.keys(), "an argument whose flags are not checked here"
    taken = {name for base in CreateConfig.__mro__ for name in inspect.signature(base.__init__).parameters}
    assert arguments <= taken


def test_all_names_exist_in_tensorrt_and_in_tensorrt_rtx(names: dict[str, dict[str, list[str]]]) -> None:
    found = used()
    assert len(found) > 60, "the search for names no longer finds them"
    assert {
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_device_memory"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("ICudaEngine", "get_aliased_input_tensor"),
    } <= found
    for owner, member in sorted(found.union(*BY_TEXT.values(), *BY_POLYGRAPHY.values())):
        for package, members in names.items():
            if package == "tensorrt_rtx" or not {owner, member} & RTX_ONLY:
                where = members[owner] if owner else members
                assert member in where, f"{package} has no {owner}.{member}"
    assert "execute_async_v2" not in names["tensorrt_bindings"]["IExecutionContext"], "what is gone would be noticed"


def test_the_double_has_nothing_that_tensorrt_has_not(names: dict[str, dict[str, list[str]]]) -> None:
    doubles = {DoubleRuntime: "Runtime", DoubleEngine: "ICudaEngine", DoubleContext: "IExecutionContext"}
    for double, kind in doubles.items():
        methods = {name for name in vars(double) if not name.startswith("_")}
        assert methods
        assert methods <= set(names["tensorrt_bindings"][kind]), double
    module = {name for name in vars(DoubleTensorRT) if not name.startswith("_")}
    assert module <= set(names["tensorrt_bindings"])


def test_all_calls_of_cuda_exist_in_cuda_python() -> None:
    from cuda.bindings import runtime

    calls = {parts[parts.index("api") + 1] for parts in attributes("runtime/tensorrt/cuda.py") if "api" in parts[:-1]}
    assert len(calls) > 15
    double: Any = {name for name in vars(DoubleCuda) if name.startswith("cuda")}
    for name in calls | double:
        assert hasattr(runtime, name), name
    for parts in attributes("runtime/tensorrt/cuda.py"):
        if "api" in parts and len(parts) > parts.index("api") + 2:  # members of enumerations
            owner, member = parts[parts.index("api") + 1 :][:2]
            assert hasattr(getattr(runtime, owner), member), f"{owner}.{member}"
