"""Which zeros training keeps: those of pruning, not those a layer has for other reasons."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Affine, Codebook, Dense, Masked, Sparse
from onnxcompress.encodings.base import Encoding
from onnxcompress.model import bridge, provenance
from onnxcompress.model.load import load
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.zeros import KeepZeros
from tests.training.small import arrays, mlp, opened


def first(of: ir.Model) -> Weight:
    return next(w for w in weights(of) if w.key == "w1")


def student(encoding: Encoding) -> ir.Model:
    of = load(mlp())
    first(of).replace(encoding)
    return of


def zeroed(share: float) -> np.ndarray:
    array = np.array(first(load(mlp())).array())
    array[np.abs(array) <= np.quantile(np.abs(array), share)] = 0
    return array


def still_zero(of: ir.Model, keep: KeepZeros, reference: ir.Model | None = None) -> tuple[float, Encoding]:
    """The share of the zeros of w1 that training keeps, and how w1 is stored then."""
    data = opened(of, arrays(64))
    done = distill(None, of, data, settings=Settings(epochs=2, lr=1e-2, keep_zeros=keep), reference=reference)
    new = bridge.clone(of)
    write(new, done.parameters)
    before, after = first(of).array(), first(new)
    return float(np.mean(after.array()[before == 0] == 0)), after.encoding


@pytest.mark.parametrize(
    ("share", "keep", "kept"),
    [(0.5, "auto", 1), (0.05, "auto", 0), (0.05, "always", 1), (0.005, "always", 1), (0.5, "never", 0)],
)
def test_zeros_of_a_plain_tensor(share: float, keep: KeepZeros, kept: float) -> None:
    found, encoding = still_zero(student(Masked(zeroed(share))), keep)
    assert found == kept
    assert encoding.kind == ("masked" if kept else "dense")


def test_few_zeros_are_kept_where_they_are_known_to_be_pruned() -> None:
    of = student(Masked(zeroed(0.05)))
    assert still_zero(of, "auto", reference=load(mlp()))[0] == 1
    assert still_zero(of, "auto", reference=of)[0] == 0  # it had them before
    noted = student(Masked(zeroed(0.005)))  # too few to be read off, so the tensor says it
    assert still_zero(noted, "auto")[0] == 1
    lost = student(Dense(zeroed(0.005)))  # as a rewrite of the graph leaves it
    assert still_zero(lost, "auto")[0] < 1
    assert still_zero(lost, "auto", reference=load(mlp()))[0] == 1
    provenance.write(of, provenance.Provenance(parent="0" * 64, recipe="magnitude-pruning"))
    assert still_zero(of, "auto")[0] == 1


@pytest.mark.parametrize(("keep", "kept"), [("auto", 1), ("never", 0)])
def test_a_sparse_weight_is_let_go_only_when_told(keep: KeepZeros, kept: float) -> None:
    found, encoding = still_zero(student(Sparse.pack(zeroed(0.1))), keep)
    assert found == kept
    assert encoding.kind == ("sparse" if kept else "dense")


def integers(share: float, masked: bool = False) -> Affine:
    """w1 in steps of 0.01, of which it is 40 wide: about 1 % is zero by rounding alone."""
    q = np.clip(np.rint(zeroed(share) / 0.01), -128, 127).astype(np.int8)
    return Affine(q, np.array(0.01, np.float32), masked=masked)


@pytest.mark.parametrize(
    ("share", "keep", "kept"),
    [(0.6, "auto", 1), (0.3, "auto", 1), (0.3, "always", 1), (0.6, "never", 0), (0, "auto", 0), (0, "always", 1)],
)
def test_a_pruned_weight_that_was_quantized(share: float, keep: KeepZeros, kept: float) -> None:
    found, encoding = still_zero(student(integers(share)), keep)
    assert (found == 1) == bool(kept)
    assert encoding.kind == "affine"


def test_few_zeros_among_integers_are_kept_where_the_file_says_so_and_it_goes_on_saying_so() -> None:
    assert still_zero(student(integers(0.01)), "auto")[0] < 1
    of = student(integers(0.01, masked=True))
    found, encoding = still_zero(of, "auto")
    assert found == 1
    assert isinstance(encoding, Affine)
    assert encoding.masked
    found, encoding = still_zero(of, "never")
    assert found < 1
    assert isinstance(encoding, Affine)
    assert not encoding.masked


@pytest.mark.parametrize("stored", ["sparse", "codebook", "folded"])
def test_zeros_of_stored_forms_stay_where_training_needs_a_newer_opset(stored: str) -> None:
    proto = mlp()
    proto.opset_import[0].version = 11
    of, array = load(proto), zeroed(0.5)
    codes, table = np.where(array == 0, 0, np.where(array < 0, 1, 2)), np.array([0, -0.4, 0.4, 0], np.float32)
    forms: dict[str, Encoding] = {
        "sparse": Sparse.pack(array),
        "codebook": Codebook(codes.astype(np.uint8), table),
        "folded": dataclasses.replace(integers(0.5), form="folded"),
    }
    first(of).replace(forms[stored])
    found, encoding = still_zero(of, "auto")
    assert found == 1
    assert type(encoding) is type(forms[stored])
    assert np.any(encoding.decode() != first(of).array())


def test_zeros_that_stood_out_are_known_when_training_has_brought_others_beside_them() -> None:
    encoding = integers(0.05)
    assert encoding.shows_zeros()
    w = encoding.decode()
    moved = np.where((w != 0) & (np.abs(w) < 0.1), np.sign(w) * np.float32(0.01), w)
    new = encoding.updated({"w": moved})
    assert new.masked
    assert not new.shows_zeros()
    assert not encoding.updated({"w": np.where(w == 0, np.float32(0.01), w)}).masked  # they were let go
