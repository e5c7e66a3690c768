"""Whether a model is a causal language model, found by trying, and the next tokens it is then trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnxcompress.training.samples import Samples
from onnxcompress.training.targets import IGNORED

Logits = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def next_tokens(
    logits: Logits,
    feeds: Mapping[str, np.ndarray],
    samples: Samples,
    shapes: Mapping[str, tuple[int, ...]],
    teacher_of: Mapping[str, str],
) -> tuple[str, np.ndarray] | None:
    """The first of the outputs `shapes` that predicts them, and each position's next token, int64 [samples, positions],
    -100 where there is none; None for any other model.

    A model is causal when another last token changes nothing but the last position's logits.
    """
    name = _tokens(feeds)
    if name is None:
        return None
    ids = samples.feeds[name]
    output = next((o for o, s in shapes.items() if len(s) == 3 and s[1] == ids.shape[1]), None)
    if output is None or ids.shape[1] < 2 or int(ids.max()) >= shapes[output][2]:
        return None
    changed = np.array(feeds[name])
    changed[:, -1] = np.where(changed[:, -1] == changed[:, 0], changed[:, -2], changed[:, 0])
    if np.array_equal(changed, feeds[name]):
        return None
    before, after = (logits({**feeds, name: array})[teacher_of[output]] for array in (feeds[name], changed))
    same = np.allclose(before[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-4)
    if not same or np.allclose(before[:, -1], after[:, -1], rtol=1e-4, atol=1e-4):
        return None
    found = np.full(ids.shape, IGNORED, np.int64)
    found[:, :-1] = ids[:, 1:]
    mask = next((a for n, a in samples.feeds.items() if "mask" in n.lower() and a.shape == ids.shape), None)
    if mask is not None:
        real = np.asarray(mask) != 0
        found[:, :-1][~(real[:, :-1] & real[:, 1:])] = IGNORED
    return output, found


def _tokens(feeds: Mapping[str, np.ndarray]) -> str | None:
    found = [name for name, array in feeds.items() if array.ndim == 2 and array.dtype.kind in "iu"]
    if "input_ids" in found:
        return "input_ids"
    plain = [name for name in found if not any(word in name.lower() for word in ("mask", "type", "position"))]
    return plain[0] if len(plain) == 1 else None
