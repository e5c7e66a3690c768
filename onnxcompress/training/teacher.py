"""The teacher: the original model in a session of its own with constant weights, its logits kept once computed."""

from __future__ import annotations

import concurrent.futures
import pathlib
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Progress
from onnxcompress.data.axes import batch_axes
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import ModelError
from onnxcompress.model.taps import tap
from onnxcompress.runtime.session import open_session
from onnxcompress.training.heads import Head
from onnxcompress.training.samples import Samples
from onnxcompress.validation.values import is_distribution

IN_MEMORY = 1 << 30
CACHED = 16 << 30  # bytes of logits above which the teacher runs again in every step
_LEAST_PROBABILITY = 1e-30


class Teacher:
    """Logits of the heads `heads` of `model` for any feeds.

    Each call runs on one thread, and `threads` calls side by side where there are several to make: the last bit of
    ONNX Runtime's results differs with its number of threads.
    """

    def __init__(self, model: ir.Model, heads: Sequence[Head], *, provider: str = "cpu", threads: int = 1) -> None:
        names = {value.name for value in model.graph.outputs}
        inner = [head.logits for head in heads if head.logits not in names]
        self._at = {head.output: head.logits for head in heads}
        if inner:
            tapped = tap(model, inner)
            if tapped.left:
                raise ModelError(f"the teacher's logits cannot be read: {next(iter(tapped.left.values()))}")
            model = tapped.model
            self._at = {output: tapped.outputs.get(name, name) for output, name in self._at.items()}
        self._heads = {head.output: head for head in heads}
        self._session = open_session(model, provider=provider, threads=1)
        self.threads = threads
        self._wants = {port.name: port.dtype for port in self._session.inputs}
        self._probabilities: dict[str, bool] = {}
        self._samples_at = batch_axes(input_specs(model))
        self._along: dict[str, int] = {}

    def logits(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Output name -> logits, samples along the first axis; log p where the model hands out probabilities and
        nothing is known behind them.

        softmax(log(p) / T) is the renormalized p^(1/T), so the soft targets are the same.
        """
        given = {name: _as(self._wants[name], array) for name, array in feeds.items() if name in self._wants}
        found = self._session.run(given, list(self._at.values()))
        count = next((given[name].shape[axis] for name, axis in self._samples_at.items() if name in given), 1)
        return {output: self._as_logits(output, np.asarray(found[name]), count) for output, name in self._at.items()}

    def along(self, output: str) -> int:
        """The axis of the model's own output along which samples lie; known after the first call, and then fixed."""
        return self._along.get(output, 0)

    def _as_logits(self, output: str, array: np.ndarray, count: int) -> np.ndarray:
        array = array.astype(np.float32, copy=False)
        if output not in self._along:
            self._along[output] = _axis_of(array.shape, count)
        array = np.moveaxis(array, self._along[output], 0) if self._along[output] else array
        if output not in self._probabilities:
            plain = self._heads[output].kind == "values" and array.ndim >= 2 and array.shape[-1] > 1
            self._probabilities[output] = plain and bool(is_distribution(array))
        return np.log(np.maximum(array, _LEAST_PROBABILITY)) if self._probabilities[output] else array

    def close(self) -> None:
        """Release the session."""
        self._session.close()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def _axis_of(shape: tuple[int, ...], count: int) -> int:
    """The axis of `count` samples: the first where it may be."""
    return 0 if not shape or shape[0] == count or count not in shape else shape.index(count)


def _as(wanted: np.dtype[Any] | None, array: np.ndarray) -> np.ndarray:
    """A feed in the teacher's own floats, which a student in half precision does not share."""
    floats = wanted is not None and wanted.kind == "f" and array.dtype.kind == "f"
    return array.astype(wanted, copy=False) if floats else array


def cache(
    teacher: Teacher, samples: Samples, size: int, work: pathlib.Path | None, progress: Progress
) -> dict[str, np.ndarray] | None:
    """The teacher's logits for every sample, in memory or mapped from `work`; None where they would not fit.

    `size`: samples a call. They belong to untrimmed feeds: positions lie where the samples have them.
    """
    first = teacher.logits(samples.rows(np.arange(min(size, samples.count))))
    total = sum(array.nbytes // len(array) * samples.count for array in first.values())
    if total > CACHED or (work is None and total > IN_MEMORY):
        return None
    stored = {name: _empty((samples.count, *array.shape[1:]), total, work) for name, array in first.items()}
    progress.start("teacher", samples.count)
    starts = range(0, samples.count - size + 1 if samples.count >= size else 1, size)

    def keep(at: int) -> int:
        chosen = np.arange(at, min(at + size, samples.count))
        _keep(stored, chosen, teacher.logits(samples.rows(chosen)))
        return len(chosen)

    with concurrent.futures.ThreadPoolExecutor(teacher.threads) as pool:
        for count in pool.map(keep, starts):
            progress.step(count)
    rest = samples.count % size
    if rest and samples.count > size:  # a fixed batch wants whole calls: the last one overlaps
        chosen = np.arange(samples.count - size, samples.count)
        _keep(stored, chosen, teacher.logits(samples.rows(chosen)))
        progress.step(rest)
    progress.done()
    return stored


def _keep(stored: Mapping[str, np.ndarray], chosen: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    for name, array in found.items():
        if array.shape[1:] != stored[name].shape[1:] or len(array) != len(chosen):
            raise ModelError(f"the teacher's output {name!r} is {list(array.shape)} for {len(chosen)} samples")
        stored[name][chosen] = array


def _empty(shape: tuple[int, ...], total: int, work: pathlib.Path | None) -> np.ndarray:
    if work is None or total <= IN_MEMORY:
        return np.empty(shape, np.float32)
    with tempfile.NamedTemporaryFile(dir=work, suffix=".spill", delete=False) as file:
        pass
    mapped: np.ndarray[Any, Any] = np.memmap(file.name, np.float32, "w+", shape=shape)
    return mapped
