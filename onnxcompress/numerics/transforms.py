"""Tells fixed transforms of audio front ends (Fourier, mel) from learned weights: their exactness is their purpose."""

from __future__ import annotations

import numpy as np

_LEAST_ROWS, _LEAST_LENGTH = 8, 32
_MOST_ELEMENTS = 1 << 21  # a Fourier basis of 1,024 points; more is no front end, and would be costly to look at
_LOBE = 2  # bins on either side of a windowed sinusoid's peak that hold its main lobe (Hann)
_SHARE, _MOST = 0.95, 0.9  # energy within the lobe; share of rows that must have it


def is_transform(array: np.ndarray, axis: int | None) -> bool:
    """True when the rows of `array` along its output axis are sinusoids, windowed or not, or a bank of triangles."""
    if axis is None or array.ndim < 2 or array.size > _MOST_ELEMENTS:
        return False
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    if rows.shape[0] < _LEAST_ROWS or rows.shape[1] < _LEAST_LENGTH or not np.isfinite(rows).all():
        return False
    return _sinusoids(rows) or _filter_bank(rows)


def _sinusoids(rows: np.ndarray) -> bool:
    rows = rows[np.abs(rows).max(axis=1) > 1e-6 * np.abs(rows).max()]
    if len(rows) < _LEAST_ROWS:
        return False
    tried = rows[np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int)]
    power = np.abs(np.fft.rfft(tried, axis=1)) ** 2
    peak = power.argmax(axis=1)
    near = np.abs(np.arange(power.shape[1]) - peak[:, None]) <= _LOBE
    share = (power * near).sum(axis=1) / power.sum(axis=1)
    # A bank of one frequency would be a smooth learned kernel; a transform spreads its rows over the spectrum.
    return bool((share >= _SHARE).mean() >= _MOST and len(np.unique(peak)) * 4 >= len(tried))


def _filter_bank(rows: np.ndarray) -> bool:
    if (rows < 0).any() or (rows > 0).mean() > 0.5:
        return False
    for row in rows[rows.any(axis=1)]:
        support = np.flatnonzero(row)
        band = row[support[0] : support[-1] + 1]
        top = int(band.argmax())
        if not band.all() or (np.diff(band[: top + 1]) < 0).any() or (np.diff(band[top:]) > 0).any():
            return False
    return int(rows.any(axis=1).sum()) >= _LEAST_ROWS
