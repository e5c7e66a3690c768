"""Pieces of an encoding decode to exactly what the whole does."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from onnxcompress.encodings import Affine, Codebook, Dense, Masked, Sparse
from onnxcompress.encodings.base import Encoding
from onnxcompress.encodings.pieces import pieces

GENERATOR = np.random.default_rng(5)
W = GENERATOR.standard_normal((37, 5, 3)).astype(np.float32)
CUT = np.where(GENERATOR.random(W.shape) < 0.6, 0, W).astype(np.float32)
CODES = GENERATOR.integers(0, 16, W.shape).astype(np.uint8)
Q = GENERATOR.integers(-128, 128, W.shape).astype(np.int8)


def table(*shape: int) -> np.ndarray:
    return np.sort(GENERATOR.standard_normal(shape)).astype(np.float16)


def affine(axis: int | None, block: int | None = None) -> Affine:
    shape = () if axis is None else (W.shape[axis],)
    if block is not None:
        assert axis is not None
        shape = tuple(-(-d // block) if i == axis else d for i, d in enumerate(W.shape))
    scale = GENERATOR.random(shape).astype(np.float32) + 0.1
    return Affine(Q, scale, GENERATOR.integers(-9, 9, shape).astype(np.int8), axis, block)


ENCODINGS: dict[str, Encoding] = {
    "dense": Dense(W),
    "masked": Masked(CUT),
    "sparse": Sparse.pack(CUT),
    "sparse, all kept": Sparse.pack(W),
    "codebook": Codebook(CODES, table(16), out=np.dtype(np.float32)),
    "codebook, axis 0": Codebook(CODES, table(37, 16), 0, np.dtype(np.float32)),
    "codebook, axis 1": Codebook(CODES, table(5, 16), 1, np.dtype(np.float32)),
    "affine": affine(None),
    "affine, axis 0": affine(0),
    "affine, axis 2": affine(2),
    "affine, blocks of axis 0": affine(0, 4),
    "affine, blocks of axis 1": affine(1, 2),
    "affine, folded": dataclasses.replace(affine(0), form="folded"),
    "affine, int4": Affine(np.clip(Q, -8, 7).astype(ml_dtypes.int4), np.array(0.5, np.float32)),
}


@pytest.mark.parametrize("most", [1, 15, 16, 31, 100, 10_000])
@pytest.mark.parametrize("name", list(ENCODINGS))
def test_pieces_are_the_whole(name: str, most: int) -> None:
    whole = ENCODINGS[name]
    found = list(pieces(whole, most))
    joined = np.concatenate([piece.decode() for _, piece in found])
    assert joined.tobytes() == np.ascontiguousarray(whole.decode()).tobytes()
    assert joined.dtype == whole.dtype
    assert [index for part, _ in found for index in range(*part.indices(37))] == list(range(37))
    assert all(piece.kind == whole.kind for _, piece in found)
    if "blocks of axis 0" not in name:
        assert max(len(piece.decode()) for _, piece in found) == min(37, max(1, most // 15))


def test_a_scalar_is_one_piece() -> None:
    (found,) = pieces(Dense(np.array(3, np.float32)), 1)
    assert found[1].decode() == 3
