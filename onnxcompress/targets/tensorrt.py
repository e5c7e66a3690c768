"""TensorRT, from its documentation (not run): explicit quantization with Q/DQ.

Zero points are 0 and types signed; the bias stays float; weights per channel along axis 0 of Conv and 1 of
ConvTranspose; the input of a residual Add that skips is quantized. No QLinear, Integer or DynamicQuantizeLinear
operator, no integer initializer but in front of DequantizeLinear.
"""

from __future__ import annotations

from onnxcompress.targets.base import Target
from onnxcompress.targets.tensorrt_operators import INTEGER, LIMITS, UNSUPPORTED

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
    refused=INTEGER | UNSUPPORTED | {"uint8 initializer"},
    strict=True,
    zero_points=False,
    channels=False,
    between=False,
    weight_only=False,
    types=frozenset({"int8", "int4", "float8_e4m3fn", "float4_e2m1fn"}),
    blocks=(64, 128),
    domains=frozenset({"", "ai.onnx", "trt.plugins"}),
    opsets=(9, 22),
    limits=LIMITS,
)
