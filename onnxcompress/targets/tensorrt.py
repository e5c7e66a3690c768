"""TensorRT, from its documentation (not run): explicit quantization with Q/DQ.

Zero points are 0 and types signed; the bias stays float; weights per channel along axis 0 of Conv and 1 of
ConvTranspose; the input of a residual Add that skips is quantized. No QLinear, Integer or DynamicQuantizeLinear
operator, no integer initializer but in front of DequantizeLinear.
"""

from __future__ import annotations

from onnxcompress.targets.base import Target

TENSORRT = Target(
    name="tensorrt",
    activation="int8",
    symmetric=True,
    weights="full",
    dynamic=False,
    integer_rows=False,
    output=False,
    pass_through=frozenset(),
    joined=frozenset({"Add"}),
    bias="float",
    weight_axis=(("Conv", 0), ("ConvTranspose", 1)),
    refused=frozenset(
        {"DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "uint8 initializer"}
    ),
)
