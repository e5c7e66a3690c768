"""How coarse the levels are between which a weight moves in training."""

from __future__ import annotations

import numpy as np

from onnxcompress.encodings import Affine
from onnxcompress.encodings.base import Encoding

FINE = 0.05  # levels of this share of a weight's root mean square, and finer ones, train as if there were none


def step_factor(encoding: Encoding) -> float:
    """By how much the steps of a weight are made smaller for its levels: min(1, 0.05 rms / s), s the distance of two.

    A step of size d moves a share d / s of the elements by a whole level and the others not at all, so that beside the
    step there is noise of size sqrt(d s). With steps made smaller in proportion to s it stays the same at any s. In 8
    bits the factor is 1, mostly, in 4 bits 0.1 to 0.2.
    """
    if not isinstance(encoding, Affine) or encoding.q.dtype.itemsize > 1:
        return 1.0
    w = encoding.decode().astype(np.float64)
    if not w.any():
        return 1.0
    scale = np.sqrt(np.mean(np.square(encoding.scale, dtype=np.float64)))
    rms = np.sqrt(np.mean(np.square(w[w != 0])))
    return float(min(1.0, FINE * rms / scale))
