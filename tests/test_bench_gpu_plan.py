"""What is read from the program that TensorRT-RTX writes into a plan."""

from __future__ import annotations

from bench.gpu.plan import kernels, of_a_step
from tarflow.runtime.bundle import Bundle

from .conftest import DEMO

PROGRAM = b"""\
constants
main {
 label bb1: \n\
  function={ name=__myl_AddCast fqn=__myl_AddCast_0x1 input_args={ "x_next.1" } }
  function={ name=__myl_TranReshMove fqn=__myl_TranReshMove_0x2 args={ "a" } input_args={ "key_3_next.1" } }
  function={ name=__myl_ReshMove fqn=__myl_ReshMove_0x3 args={ "a" } input_args={ "x_next.1" } }
  runtime_fusion={ name=__myl_FcAdd input_args={ "a" } }
  fully_connected={ name="Gemm_50" output={"b" } }

shape_main {
 label bb2: \n\
  function={ name=__myl_OnTheHost }
"""


def test_kernels_of_a_program_are_counted_and_those_that_copy_a_cache() -> None:
    (one,) = kernels(PROGRAM)
    assert (one["kernels"], one["copy a cache"]) == (5, 1)
    assert one["by name"] == dict.fromkeys(
        ["__myl_AddCast", "__myl_TranReshMove", "__myl_ReshMove", "__myl_FcAdd", "product"], 1
    )


def test_a_step_on_tensorrt_rtx_is_fewer_kernels_than_layers() -> None:
    """In step with bench/RESULTS-GPU.md: some ten kernels for a layer of the model, two of which copy its caches."""
    found = of_a_step(Bundle.open(DEMO), "8.9", 4)
    layers = Bundle.open(DEMO).manifest.config.layers
    for branches in ("unguided", "guided"):
        assert 8 * layers < found[branches]["kernels"] <= 11 * layers + 6
        assert found[branches]["copy a cache"] == 2 * layers
    assert found["unguided"]["kernels"] < sum(found["layers"].values()) / 5
