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
from onnxcompress.data.cast import is_float
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.taps import tap
from onnxcompress.runtime.session import open_session
from onnxcompress.training.heads import Head, laid_out
from onnxcompress.training.readings import Reading, as_logits
from onnxcompress.training.samples import Samples
from onnxcompress.training.wide import widen

IN_MEMORY = 1 << 30
CACHED = 16 << 30  # bytes of logits above which the teacher runs again in every step


class Teacher:
    """Logits of the heads `heads` of `model` for any feeds.

    Each call runs on one thread, and `threads` calls side by side where there are several to make: the last bit of
    ONNX Runtime's results differs with its number of threads. `inputs`: an input of `model` -> what feeds call it,
    where they call it something else. `readings`: output -> how its logits are read, "logits" where none is set.
    """

    def __init__(
        self,
        model: ir.Model,
        heads: Sequence[Head],
        *,
        inputs: Mapping[str, str] | None = None,
        provider: str = "cpu",
        threads: int = 1,
    ) -> None:
        self._samples_at = batch_axes(input_specs(model))
        model = laid_out(_runnable(model), heads)
        names = {value.name for value in model.graph.outputs}
        values = dict.fromkeys(name for head in heads for name in (head.laid, head.scores))
        tapped = tap(model, [name for name in values if name not in names])
        if tapped.left:
            raise ModelError(f"the teacher's logits cannot be read: {next(iter(tapped.left.values()))}")
        self._given_as = {name: tapped.outputs.get(name, name) for name in values}
        self._heads = {head.output: head for head in heads}
        self._session = open_session(tapped.model, provider=provider, threads=1)
        self.threads = threads
        self.readings: dict[str, Reading] = {}
        self._wants = {port.name: port.dtype for port in self._session.inputs}
        self._fed_as = {name: (inputs or {}).get(name, name) for name in self._wants}
        self._along: dict[str, int] = {}

    def logits(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Output name -> logits as they are read, float32, samples along the first axis."""
        readings = {output: self.readings.get(output, "logits") for output in self._heads}
        found = self._run(feeds, {o: h.laid if readings[o] == "logits" else h.scores for o, h in self._heads.items()})
        return {output: as_logits(array, readings[output]) for output, array in found.items()}

    def scores(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Output name -> the numbers that the model gives, float32, samples along the first axis."""
        return self._run(feeds, {output: head.scores for output, head in self._heads.items()})

    def _run(self, feeds: Mapping[str, np.ndarray], values: Mapping[str, str]) -> dict[str, np.ndarray]:
        """`values`: by output."""
        given = {n: _as(self._wants[n], feeds[source]) for n, source in self._fed_as.items() if source in feeds}
        found = self._session.run(given, list(dict.fromkeys(self._given_as[name] for name in values.values())))
        count = next((given[name].shape[axis] for name, axis in self._samples_at.items() if name in given), 1)
        return {output: self._moved(output, found[self._given_as[name]], count) for output, name in values.items()}

    def _moved(self, output: str, array: np.ndarray, count: int) -> np.ndarray:
        array = np.asarray(array).astype(np.float32, copy=False)
        at = self._along.setdefault(output, _axis_of(array.shape, count))
        return np.moveaxis(array, at, 0) if at else array

    def along(self, output: str) -> int:
        """The axis of the model's own output along which samples lie; known after the first call, and then fixed."""
        return self._along.get(output, 0)

    def close(self) -> None:
        """Release the session."""
        self._session.close()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def _runnable(model: ir.Model) -> ir.Model:
    """`model`, in single precision where it has bfloat16, for which ONNX Runtime (1.32) lacks most kernels."""
    if all(value.dtype != ir.DataType.BFLOAT16 for value in (*model.graph.inputs, *model.graph.initializers.values())):
        return model
    copy = bridge.clone(model)
    widen(copy)
    return copy


def _axis_of(shape: tuple[int, ...], count: int) -> int:
    """The axis of `count` samples: the first where it may be."""
    return 0 if not shape or shape[0] == count or count not in shape else shape.index(count)


def _as(wanted: np.dtype[Any] | None, array: np.ndarray) -> np.ndarray:
    """A feed in the teacher's own floats, bfloat16 among them, which a student may not share."""
    floats = wanted is not None and is_float(wanted) and is_float(array.dtype)
    return array.astype(wanted, copy=False) if floats else array


def cache(
    teacher: Teacher, samples: Samples, size: int, work: pathlib.Path | None, progress: Progress
) -> dict[str, np.ndarray] | None:
    """The teacher's logits for every sample, in memory or mapped from `work`; None where they would not fit.

    `size`: samples a call, of like length, so that little padding is computed. Positions lie where the samples have
    them; those that a call left out are 0.
    """
    first = teacher.logits(samples.rows(np.arange(min(size, samples.count))))
    total = sum(array.nbytes // len(array) * samples.count for array in first.values())
    if total > CACHED or (work is None and total > IN_MEMORY):
        return None
    stored = {name: _empty((samples.count, *array.shape[1:]), total, work) for name, array in first.items()}
    progress.start("teacher", samples.count)
    lengths = samples.lengths
    order = np.arange(samples.count) if lengths is None else np.argsort(lengths, kind="stable")
    # A fixed batch wants whole calls: the last one overlaps the one before.
    starts = [max(0, min(at, samples.count - size)) for at in range(0, samples.count, size)]

    def keep(at: int) -> int:
        chosen = order[at : at + size]
        _keep(stored, chosen, teacher.logits(samples.call(chosen)[0]))
        return len(chosen)

    done = 0
    with concurrent.futures.ThreadPoolExecutor(teacher.threads) as pool:
        for count in pool.map(keep, starts):
            progress.step(min(count, samples.count - done))
            done += count
    progress.done()
    return stored


def _keep(stored: Mapping[str, np.ndarray], chosen: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    for name, array in found.items():
        whole, got = stored[name].shape[1:], array.shape[1:]
        fewer = len(got) > 0 and len(got) == len(whole) and got[0] < whole[0] and got[1:] == whole[1:]
        if len(array) != len(chosen) or not (got == whole or fewer):
            raise ModelError(f"the teacher's output {name!r} is {list(array.shape)} for {len(chosen)} samples")
        if fewer:
            stored[name][chosen, got[0] :] = 0
            stored[name][chosen, : got[0]] = array
        else:
            stored[name][chosen] = array


def _empty(shape: tuple[int, ...], total: int, work: pathlib.Path | None) -> np.ndarray:
    if work is None or total <= IN_MEMORY:
        return np.empty(shape, np.float32)
    with tempfile.NamedTemporaryFile(dir=work, suffix=".spill", delete=False) as file:
        pass
    mapped: np.ndarray[Any, Any] = np.memmap(file.name, np.float32, "w+", shape=shape)
    return mapped
