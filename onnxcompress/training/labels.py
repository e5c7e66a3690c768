"""Labels as a loss takes them: indices of classes, or numbers like the logits'. Axes of size 1 may be there or not."""

from __future__ import annotations

import numpy as np

from onnxcompress.errors import DataError
from onnxcompress.training.targets import IGNORED

_CLOSE = 1e-3  # of a distribution's sum to 1


def check_finite(labels: np.ndarray | None) -> None:
    """Refuse nan and infinities.

    Raises:
        DataError: naming the first sample with one.
    """
    if labels is None or labels.dtype.kind != "f" or np.isfinite(labels).all():
        return
    sample, *at = np.argwhere(~np.isfinite(labels))[0]
    raise DataError(
        f"the label of sample {sample} holds {labels[(sample, *at)]}: mend it, or leave the sample out of the data"
    )


def is_whole(labels: np.ndarray) -> bool:
    """Whether all are whole numbers, in whatever type."""
    return labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)))


def indexed(labels: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, np.ndarray] | None:
    """The first of `axes` without which logits of `shape` have the labels' shape, and the labels, int64, in that shape;
    None where they are no indices of classes."""
    if not is_whole(labels):
        return None
    for axis in axes:
        if not 0 < axis < len(shape):
            continue
        positions = tuple(dim for i, dim in enumerate(shape) if i != axis)[1:]
        if _squeezed(labels.shape[1:]) == _squeezed(positions):
            return axis, labels.reshape(len(labels), *positions).astype(np.int64)
    return None


def like(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The labels, float32, one for each number of logits of `shape`; None where they do not fit."""
    if labels.dtype.kind not in "iubf" or _squeezed(labels.shape[1:]) != _squeezed(shape[1:]):
        return None
    return labels.reshape(len(labels), *shape[1:]).astype(np.float32)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dim for dim in shape if dim != 1)


def are_distributions(labels: np.ndarray, axis: int) -> bool:
    """Whether all are nonnegative and add up to 1 along `axis`: soft or one-hot labels."""
    return not _not_distributions(labels, axis).any()


def _not_distributions(labels: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray((np.abs(labels.sum(axis) - 1) > _CLOSE) | (labels < 0).any(axis))


def checked_classes(labels: np.ndarray, classes: int, output: str) -> np.ndarray:
    """Indices below `classes`.

    Raises:
        DataError: naming the first sample with another.
    """
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label {labels[tuple(at)]} of sample {at[0]} is out of range: output {output!r} has classes 0 to "
            f"{classes - 1} ({IGNORED} leaves one out)"
        )
    return labels


def checked_distributions(labels: np.ndarray, axis: int) -> np.ndarray:
    """Labels that are distributions along `axis`.

    Raises:
        DataError: naming the first sample with another.
    """
    wrong = _not_distributions(labels, axis)
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label of sample {at[0]} is no distribution: it sums up to {labels.sum(axis)[tuple(at)]:g} (for several "
            "labels a sample, --loss binary)"
        )
    return labels


def checked_binary(labels: np.ndarray, output: str) -> np.ndarray:
    """Labels from 0 (no) to 1 (yes).

    Raises:
        DataError: naming the first sample with another.
    """
    wrong = (labels < 0) | (labels > 1)
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label {labels[tuple(at)]:g} of sample {at[0]} is neither yes nor no: output {output!r} wants 0 to 1"
        )
    return labels
