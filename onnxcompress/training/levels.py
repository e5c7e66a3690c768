"""How coarse the levels are between which a weight moves in training."""

from __future__ import annotations

import numpy as np

from onnxcompress.encodings import Affine
from onnxcompress.encodings.affine import bits_of
from onnxcompress.encodings.base import Encoding

FINE = 0.05  # levels of this share of a weight's root mean square, and finer ones, train as if there were none


def step_factor(encoding: Encoding) -> float:
    """By how much the steps of a weight of fewer than 8 bits are made smaller: min(1, 0.05 rms / s).

    s is the distance of two levels, root mean square over scales; rms that of what is not 0. A step of size d moves a
    share d / s of the elements by a whole level and the others not at all, so that beside the step there is noise of
    size sqrt(d s). With steps made smaller in proportion to s it stays the same at any s. In 4 bits the factor is 0.1
    to 0.2. Levels of 8 bits are fine unless their scale is too wide, which is for the scale to learn.
    """
    if not isinstance(encoding, Affine) or bits_of(encoding.q.dtype) >= 8:
        return 1.0
    w = encoding.decode().astype(np.float64)
    if not w.any():
        return 1.0
    scale = np.sqrt(np.mean(np.square(encoding.scale, dtype=np.float64)))
    rms = np.sqrt(np.mean(np.square(w[w != 0])))
    return float(min(1.0, FINE * rms / scale))
