"""The tables of the targets agree with themselves and with what was measured."""

from __future__ import annotations

import pytest

from onnxcompress.errors import RecipeError
from onnxcompress.targets import TARGETS, find


def test_there_are_four_and_a_typo_is_named() -> None:
    assert sorted(TARGETS) == ["cpu", "cuda", "portable", "tensorrt"]
    assert all(find(name).name == name for name in TARGETS)
    with pytest.raises(RecipeError, match="unknown target 'gpu': one of cpu, cuda, tensorrt, portable"):
        find("gpu")


def test_no_target_refuses_what_the_quantizer_would_write() -> None:
    for target in TARGETS.values():
        assert target.dynamic == ("DynamicQuantizeLinear" not in target.refused)
        if target.symmetric:
            assert target.activation == "int8"
        if target.activation == "uint8":
            assert target.weights != "full"  # u8 x s8 adds pairs in 16 bits where VNNI is missing
        if target.pass_through or target.bias == "int32":
            assert target.output  # integers pass on only where outputs are integers


def test_tensorrt_takes_no_bytes_but_in_front_of_dequantize() -> None:
    tensorrt = find("tensorrt")
    assert not tensorrt.integer_rows
    assert "uint8 initializer" in tensorrt.refused
    assert dict(tensorrt.weight_axis) == {"Conv": 0, "ConvTranspose": 1}
