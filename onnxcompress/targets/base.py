"""What a deployment target takes and runs fast, as far as int8 quantization and its lint ask."""

from __future__ import annotations

import dataclasses
from typing import Literal

Weights8 = Literal["full", "neighbours", "reduced"]
Bias = Literal["float", "int32"]


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a target asks of an operator that it takes.

    `constant`: inputs that must be constants. `attributes`: name -> values taken; where the attribute is a list, each
    of its elements must be one of them. `outputs`: how many outputs may be used.
    """

    operator: str
    constant: tuple[int, ...] = ()
    attributes: tuple[tuple[str, tuple[object, ...]], ...] = ()
    outputs: int | None = None


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

    The rest is read by the lint. `strict`: the target fails on what it does not take; else another provider runs it.
    `zero_points`, `channels`, `between`, `weight_only`: zero points other than 0, a scale a channel for activations,
    operators on integers between Q and DQ, and int8 weights with float activations are taken. `types`: element types of
    Q/DQ; None: any. `blocks`: block sizes of 4-bit weights; (): any. `domains`: of operators; None: any. `opsets`:
    least and greatest. `slow`: operators that run there, with why one would rather not. `limits`: see `Limit`.
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
    strict: bool = False
    zero_points: bool = True
    channels: bool = True
    between: bool = True
    weight_only: bool = True
    types: frozenset[str] | None = None
    blocks: tuple[int, ...] = ()
    domains: frozenset[str] | None = None
    opsets: tuple[int, int] | None = None
    slow: tuple[tuple[str, str], ...] = ()
    limits: tuple[Limit, ...] = ()
