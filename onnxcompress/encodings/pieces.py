"""An encoding cut along its first axis, so that a large weight is decoded, compared or run a piece at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from onnxcompress.encodings.affine import Affine
from onnxcompress.encodings.base import Encoding
from onnxcompress.encodings.codebook import Codebook
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.encodings.sparse import Sparse

ELEMENTS = 1 << 20


def pieces(encoding: Encoding, most: int = ELEMENTS) -> Iterator[tuple[slice, Encoding]]:
    """(part of the first axis, that part of `encoding`), in order; together they decode to what the whole does.

    A piece has at most `most` elements where one index of the axis has no more. A scalar is one piece.
    """
    if not encoding.shape:
        yield slice(None), encoding
        return
    length, inner = encoding.shape[0], math.prod(encoding.shape[1:])
    step = max(1, most // max(1, inner))
    if isinstance(encoding, Affine) and encoding.block is not None and encoding.axis == 0:
        step = -(-step // encoding.block) * encoding.block
    before = 0  # kept values of a sparse weight in the pieces so far
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        if isinstance(encoding, Sparse):
            piece = _sparse(encoding, part, inner, before)
            before += len(piece.values) - 1
            yield part, piece
        else:
            yield part, _cut(encoding, part)


def _cut(encoding: Encoding, part: slice) -> Encoding:
    if isinstance(encoding, Codebook):
        table = encoding.table[part] if encoding.axis == 0 else encoding.table
        return dataclasses.replace(encoding, codes=encoding.codes[part], table=table)
    if isinstance(encoding, Affine):
        scale, zero_point = encoding.scale, encoding.zero_point
        if encoding.axis is not None and encoding.block is not None:
            along = part if encoding.axis else slice(part.start // encoding.block, -(-part.stop // encoding.block))
            scale, zero_point = scale[along], None if zero_point is None else zero_point[along]
        elif encoding.axis == 0:
            scale = scale[part]
            zero_point = zero_point[part] if zero_point is not None and zero_point.ndim else zero_point
        return dataclasses.replace(encoding, q=encoding.q[part], scale=scale, zero_point=zero_point)
    if isinstance(encoding, Masked):
        return Masked(encoding.values[part])
    return Dense(encoding.decode()[part])


def _sparse(encoding: Sparse, part: slice, inner: int, before: int) -> Sparse:
    first, last = part.start * inner, part.stop * inner
    bits = np.unpackbits(encoding.mask[first // 8 : -(-last // 8)], bitorder="little")
    keep = bits[first % 8 : first % 8 + last - first]
    values = encoding.values[1 + before : 1 + before + int(np.count_nonzero(keep))]
    dims = (part.stop - part.start, *encoding.dims[1:])
    return Sparse(np.packbits(keep, bitorder="little"), np.concatenate([encoding.values[:1], values]), dims)
