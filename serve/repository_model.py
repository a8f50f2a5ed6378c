"""A model of tarflow for Triton's Python backend. It opens the bundle that lies beside this file."""

from pathlib import Path

from tarflow.serve import triton_model


class TritonPythonModel(triton_model.TritonPythonModel):
    bundle = Path(__file__).with_name("bundle")
