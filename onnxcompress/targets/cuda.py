"""The CUDA provider of ONNX Runtime (read off the kernels in its 1.31 binary, not run).

It has no DynamicQuantizeLinear and no QLinear operators: those fall to the CPU. Q/DQ run as kernels of their own around
float convolutions: small files, no speed. Weights are best expanded at load.
"""

from __future__ import annotations

from onnxcompress.targets.base import Target

CUDA = Target(
    name="cuda",
    activation="int8",
    symmetric=True,
    weights="full",
    dynamic=False,
    integer_rows=True,
    output=False,
    pass_through=frozenset(),
    joined=frozenset(),
    bias="float",
    refused=frozenset({"DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"}),
    note="the CUDA provider runs Q/DQ around float operators: the file is smaller, not faster",
)
