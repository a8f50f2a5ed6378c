"""ONNX Runtime's CUDA provider, run where there is no GPU, on libraries that stand in for CUDA's.

What the provider decides is then a fact: which nodes go where, what is captured, bound, allocated, copied, waited for,
in which thread and in what precision. Numbers are not: no kernel runs. The sources are in ``src``.
"""
