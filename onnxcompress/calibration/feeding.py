"""Runs a model over calibration data, one thread a sample, so that results do not depend on the number of threads."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcompress.data.batch import Batch, FeedsOnly
from onnxcompress.runtime.session import Session, open_session

T = TypeVar("T")
Feeds = Mapping[str, np.ndarray]


def batches(
    feeder: Iterable[Any], limit: int | None = None, step: int = 1
) -> Iterator[tuple[Feeds, np.ndarray | None]]:
    """The feeds of every `step`-th call, and booleans (rows, length) that are False on padding, or None.

    Padding is known from the data layer, or from an input called a mask that holds zeros and ones.
    """
    source: Iterable[Any] = feeder.data if isinstance(feeder, FeedsOnly) else feeder
    for batch in itertools.islice(source, 0, None if limit is None else limit * step, step):
        if isinstance(batch, Batch):
            found = next(iter(batch.valid.values()), None) if batch.valid else None
            yield batch.feeds, found if found is not None else _mask(batch.feeds)
        else:
            yield batch, _mask(batch)


def spread(feeder: Iterable[Any], calls: int) -> int:
    """The step that spreads `calls` calls over the data."""
    return max(1, sum(1 for _ in batches(feeder)) // calls)


def _mask(feeds: Feeds) -> np.ndarray | None:
    for name, array in feeds.items():
        if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "biuf":
            valid = np.asarray(array != 0)
            if not valid.all() and valid.any() and (array[valid] == 1).all():
                return valid
    return None


def outputs(
    model: ir.Model,
    names: Sequence[str],
    feeder: Iterable[Any],
    *,
    limit: int | None = None,
    step: int = 1,
    threads: int = 1,
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """The outputs `names` of every `step`-th call, in the order of the data, with the padding mask of the call.

    At most `threads` calls are held at a time.
    """
    with open_session(model, threads=1) as session:
        known = {port.name for port in session.inputs}
        calls = ((_known(feeds, known), valid) for feeds, valid in batches(feeder, limit, step))
        if threads <= 1:
            for feeds, valid in calls:
                yield session.run(feeds, names), valid
            return
        yield from _parallel(session, names, calls, threads)


def _known(feeds: Feeds, names: set[str]) -> dict[str, np.ndarray]:
    return {name: array for name, array in feeds.items() if name in names}


def _parallel(
    session: Session, names: Sequence[str], calls: Iterator[tuple[Feeds, np.ndarray | None]], threads: int
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    waiting: collections.deque[tuple[concurrent.futures.Future[dict[str, Any]], np.ndarray | None]]
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for feeds, valid in calls:
            waiting.append((pool.submit(session.run, feeds, names), valid))
            if len(waiting) >= threads:
                done, mask = waiting.popleft()
                yield done.result(), mask
        for done, mask in waiting:
            yield done.result(), mask
