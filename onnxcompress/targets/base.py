"""What a deployment target takes and runs fast, as far as int8 quantization and its lint ask."""

from __future__ import annotations

import dataclasses
from typing import Literal

Weights8 = Literal["full", "neighbours", "reduced"]
Bias = Literal["float", "int32"]


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table.

    `activation`, `symmetric`: integer type of activations, and whether their zero point must be 0. `weights`: the range
    int8 weights use where a dot product meets unsigned activations: "full" (-127..127); "neighbours": as far as no two
    neighbours along the summed axis overflow 16 bits; "reduced": within -64..64, so that no two elements can.
    `dynamic`: DynamicQuantizeLinear and MatMulInteger run there. `integer_rows`: Gather of int8 rows runs there.
    `output`: an operator runs in integers only if its output is quantized too. `pass_through`: operators that take and
    give integers of one scale; `joined`: operators that run in integers between quantized inputs and a quantized
    output. `bias`: how the bias of a quantized layer is stored where its output is float. `refused`: operators
    (op type, or op type and what about it) that the target does not take. `note`: what a report says about the target.
    """

    name: str
    activation: Literal["uint8", "int8"]
    symmetric: bool
    weights: Weights8
    dynamic: bool
    integer_rows: bool
    output: bool
    pass_through: frozenset[str]
    joined: frozenset[str]
    bias: Bias
    layers: frozenset[str] = frozenset({"Conv", "MatMul", "Gemm"})
    weight_axis: tuple[tuple[str, int], ...] = ()
    refused: frozenset[str] = frozenset()
    note: str = ""
