"""Which weights count as pruned: by what the file says, by their zeros, and by what the model was made from."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Affine, Dense, Masked
from onnxcompress.encodings.affine import stand_out
from onnxcompress.model.load import load
from onnxcompress.model.pruned import Pruned
from onnxcompress.model.save import to_bytes
from onnxcompress.model.weights import Weight, weights
from onnxcompress.numerics.affine import quantize_weight
from tests.builders import floats
from tests.training.small import mlp

W = floats(6, 200, seed=1) * 0.4  # w1 of `mlp`


def cut(share: float, array: np.ndarray = W) -> np.ndarray:
    return np.where(np.abs(array) > np.quantile(np.abs(array), share), array, np.float32(0))


def rounded(array: np.ndarray, dtype: str = "int8", axis: int | None = None, masked: bool = False) -> Affine:
    q, scale, zero = quantize_weight(array, axis=axis, dtype=dtype)
    return Affine(q, scale, zero, axis, masked=masked)


def first(of: ir.Model) -> Weight:
    return next(weight for weight in weights(of) if weight.key == "w1")


def stored(encoding: Affine | Dense | Masked) -> ir.Model:
    """`mlp` with this w1, out of a file."""
    of = load(mlp())
    of.opset_imports[""] = 21  # 4 bits
    first(of).replace(encoding)
    return load(to_bytes(of))


def is_pruned(encoding: Affine, reference: np.ndarray | None = None) -> bool:
    of = stored(encoding)
    made_from = None if reference is None else stored(Dense(reference))
    return Pruned(of, made_from)(first(of))


def test_zeros_stand_out_where_the_levels_beside_are_few() -> None:
    levels = np.repeat([-1, 0, 1, 2], [5, 16, 4, 900])
    assert stand_out(levels)
    assert not stand_out(levels[1:][levels[1:] != 0])  # none
    assert not stand_out(np.repeat([-1, 0, 1, 2], [4, 15, 4, 900]))  # too few to tell
    assert not stand_out(np.repeat([-1, 0, 1, 2], [10, 30, 2, 900]))  # three times as many as below
    assert stand_out(np.repeat([-1, 0, 1, 2], [10, 31, 2, 12]))
    assert not stand_out(np.repeat([-1, 0, 1, 2], [10, 31, 2, 11]))  # the steps are wide


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_pruning_shows_in_8_bits(share: float, axis: int | None) -> None:
    assert is_pruned(rounded(cut(share), axis=axis))
    assert is_pruned(rounded(cut(share), "uint8", axis=axis))


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
@pytest.mark.parametrize("width", [1, 3, 30])
def test_rounding_alone_does_not(distribution: str, width: float) -> None:
    # A few large elements make the steps as wide as 0.8 standard deviations.
    array = getattr(np.random.default_rng(3), distribution)(size=(6, 200)).astype(np.float32)
    array[0, 0] = 100 / width
    encoding = rounded(array)
    assert np.mean(encoding.q == 0) > (0.2 if width == 1 else 0.005)
    assert not is_pruned(encoding)


def test_of_few_levels_the_reference_tells() -> None:
    pruned, plain = rounded(cut(0.3), "int4"), rounded(W, "int4")
    assert np.mean(plain.decode() == 0) > 0.1
    assert not is_pruned(pruned)
    assert is_pruned(rounded(cut(0.7), "int4", 0))
    assert is_pruned(pruned, W)
    assert not is_pruned(plain, W)
    assert not is_pruned(pruned, cut(0.3))  # the reference had these zeros, too


def test_the_reference_tells_a_few_zeros_of_a_small_weight() -> None:
    small = W[:, :24]
    pruned, plain = rounded(cut(0.05, small)), rounded(small)
    assert np.count_nonzero(pruned.q == 0) == 8
    assert not is_pruned(pruned)
    assert is_pruned(pruned, small)
    assert not is_pruned(plain, small)
    moved = cut(0.05, small) + floats(6, 24, seed=9) * 0.1
    moved[cut(0.05, small) == 0] = 0  # trained since, which may bring about as many
    assert not is_pruned(rounded(moved), small)


def test_the_reference_may_lie_transposed_or_have_a_normalization_folded_in() -> None:
    factor = np.linspace(-2, 3, 200, dtype=np.float32) + 0.01
    for array in (cut(0.4), W):
        encoding = rounded(array * factor, "int4", 1)
        assert is_pruned(encoding, W) == (array is not W)
    square = floats(30, 30, seed=4)
    for array in (cut(0.4, square), square):
        assert is_pruned(rounded(array.T.copy(), "int4"), square) == (array is not square)


def test_a_weight_that_was_trained_since_or_is_another_one_is_not_pruned() -> None:
    moved = W + floats(6, 200, seed=9) * 0.2  # by half of its size
    assert np.mean(rounded(moved, "int4").decode() == 0) > 0.1
    assert not is_pruned(rounded(moved, "int4"), W)
    assert not is_pruned(rounded(moved), W)
    assert not is_pruned(rounded(floats(6, 200, seed=10), "int4"), W)


@pytest.mark.parametrize("form", ["dequantize-linear", "folded"])
def test_the_file_says_what_the_zeros_do_not_show(form: str) -> None:
    q = np.clip(np.rint(cut(0.01) / 0.01), -127, 127).astype(np.int8)
    for masked in (True, False):
        encoding = Affine(q, np.array(0.01, np.float32), form=form, masked=masked)  # type: ignore[arg-type]
        assert encoding.notes() == ({Masked.KEY: "1"} if masked else {})
        assert is_pruned(encoding) == masked
    assert not Affine(q, np.array(10, np.float32)).masked
    shown = rounded(cut(0.3), masked=True)
    assert not shown.notes()  # no need
    assert rounded(cut(0.3), "int4", masked=True).notes()
    assert is_pruned(rounded(cut(0.3), "int4", masked=True))


def test_what_is_no_layer_is_pruned_only_where_the_file_says_so() -> None:
    of = load(mlp())
    bias = next(weight for weight in weights(of) if weight.key == "b1")
    bias.replace(Dense(np.where(np.arange(200) < 100, bias.array(), np.float32(0))))
    assert not Pruned(of, load(mlp()))(bias)
    bias.replace(Masked(bias.array()))
    assert Pruned(of)(bias)


def test_float8_shows_pruning_and_blocks_are_compared_with_the_reference() -> None:
    for array in (cut(0.1), W):
        of_8 = Affine((array * 16).astype(ml_dtypes.float8_e4m3fn), np.array(1 / 16, np.float32))
        assert of_8.shows_zeros() == (array is not W)
    q = rounded(cut(0.3), "int4").q
    blocked = Affine(q, np.full((6, 7), np.abs(W).max() / 7, np.float32), None, 1, 32)
    assert is_pruned(blocked, W)
    assert not is_pruned(dataclasses.replace(blocked, q=rounded(W, "int4").q), W)
