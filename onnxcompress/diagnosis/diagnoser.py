"""Runs both models side by side, the compressed one also cut into its layers, and says where the error comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Progress, Silent
from onnxcompress.data.batch import Data
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.diagnosis.cut import GIVEN, cut, exposed
from onnxcompress.diagnosis.result import STANDS_OUT, Diagnosis, LayerRow
from onnxcompress.encodings import recognize
from onnxcompress.errors import DataError
from onnxcompress.model.load import Loadable, load
from onnxcompress.model.shapes import shapes
from onnxcompress.model.weights import weights
from onnxcompress.runtime.session import open_session
from onnxcompress.validation.pairing import check_fit, feeds_for
from onnxcompress.verification import Verification, verify
from onnxcompress.verification.structure import Anatomy, Made

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
FLOOR = 2e-6  # relative error that float32 explains by itself: sums in another order
GAIN = 1.5  # outputs are smaller than the sum of their terms' sizes


@dataclasses.dataclass
class _Sums:
    signal: float = 0.0
    error: float = 0.0
    own: float = 0.0
    count: int = 0
    least: float = 0.0
    most: float = 0.0

    def add(self, truth: np.ndarray, seen: np.ndarray, own: np.ndarray) -> None:
        """One call. A value that is not finite in the original alone says nothing, and counts for nothing."""
        if truth.shape != seen.shape or truth.shape != own.shape:
            self.error = self.own = math.inf
            return
        wide = truth.astype(np.float64)
        good = np.isfinite(wide) & (np.abs(wide) < 1e30)  # masks hold the least float there is
        wide = wide[good]
        self.signal += float(wide @ wide)
        for name, other in (("error", seen), ("own", own)):
            difference = other.astype(np.float64)[good] - wide
            setattr(self, name, getattr(self, name) + float(difference @ difference))
        self.count += wide.size
        self.least = min(self.least, float(wide.min(initial=0)))
        self.most = max(self.most, float(wide.max(initial=0)))


def diagnose(
    original: Loadable,
    compressed: Loadable,
    *,
    data: Any = None,
    labels: str | None = None,
    mapping: Mapping[str, str] | None = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    limit: int | None = 64,
    seed: int = 0,
    threads: int = 1,
    calibration: Any = None,
    evidence: bool = True,
    progress: Progress | None = None,
) -> Diagnosis:
    """The error each layer of `compressed` adds by itself, and which layer to blame first.

    Every value of the main graph that both models have is compared twice: as the compressed model computes it, and as
    its last layer alone does, given the original's values. Sums alone are kept from call to call. A layer is blamed
    when its own error exceeds `STANDS_OUT` times what its steps and codebooks explain. `evidence`: also blame what
    `verify` finds (with `calibration`, see there), before all else. `limit`: samples; None for all. The rest: see
    `validate`.

    Raises:
        ModelError: a model cannot be loaded or run, or has other inputs or outputs than the original.
        DataError: the data does not fit the inputs, or the original computes nothing finite on it.
    """
    first, second = load(original), load(compressed)
    proof = verify(
        second, first, calibration=calibration, labels=labels, mapping=mapping, preprocess=preprocess, threads=threads
    )
    one, two = Anatomy(first, weights(first)), Anatomy(second, weights(second))
    names = _shared(first, one, two)
    feeder: Data
    if isinstance(data, Data):
        feeder = data
    elif data is None:
        feeder = synthetic_feeds(first, seed=seed)
    else:
        settings: dict[str, Any] = {"labels": labels, "mapping": mapping, "preprocess": preprocess}
        feeder = open_data(data, input_specs(first), **settings, batch=batch, limit=limit, last="fill")
    shown = progress or Silent()
    inputs = "synthetic" if data is None else "data"
    sums, samples = _stream(first, second, names, feeder, threads, limit, shown)
    if sums and not any(sum_.count for sum_ in sums.values()):
        raise DataError("no layer of the original computes a finite number on this data: nothing can be compared")
    explained = {row.key: row.expected for row in proof.weights}
    rows = []
    for name, sum_ in sums.items():
        made = two.made_of(name, set(names))
        inside = two.inside(name)
        node = two.producers[name].producer()
        signal = math.sqrt(sum_.signal)
        expected = _expected(made.weights | inside, explained, sums, two, name, set(names))
        rows.append(
            LayerRow(
                name,
                next((op for op in made.operators if op in _LAYERS), node.op_type if node is not None else ""),
                tuple(sorted(made.weights | inside)),
                _relative(sum_.error, signal),
                _relative(sum_.own, signal),
                expected,
                _suspect(name, made, proof) if evidence else "",
            )
        )
    return Diagnosis(
        tuple(rows), tuple(_blame(rows, proof if evidence else None)), samples, inputs, _notes(proof, inputs)
    )


def _notes(proof: Verification, inputs: str) -> tuple[str, ...]:
    """What else may explain an error, besides a fault."""
    notes = []
    if inputs == "synthetic":
        notes.append("made-up inputs may leave the ranges that activations were quantized for; give --data")
    if proof.weights and not any(row.judged for row in proof.weights):
        notes.append("the model was trained: its layers may compute something else than the original's without a fault")
    return tuple(notes)


_LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Gather")


def _shared(model: ir.Model, one: Anatomy, two: Anatomy) -> dict[str, ir.DataType]:
    """Names of float values of the main graph that both models compute, in the original's order; element types."""
    known = shapes(model)
    own = {value.name for node in model.graph for value in node.outputs}
    there = {value.name for node in two.model.graph for value in node.outputs}
    found = {}
    for name in one.producers:
        info = known.get(name)
        if name in two.producers and name in own and name in there and info is not None and info.dtype in FLOATS:
            found[name] = info.dtype
    return found


def _stream(
    first: ir.Model,
    second: ir.Model,
    names: Mapping[str, ir.DataType],
    feeder: Data,
    threads: int,
    limit: int | None,
    shown: Progress,
) -> tuple[dict[str, _Sums], int]:
    """Sums over all calls, for each name, and how many samples were seen."""
    sums = {name: _Sums() for name in names}
    wanted, samples = list(names), 0
    with contextlib.ExitStack() as stack:
        truth_of = stack.enter_context(open_session(exposed(first, wanted), threads=threads))
        seen_of = stack.enter_context(open_session(exposed(second, wanted), threads=threads))
        check_fit(truth_of, seen_of)
        pieces = stack.enter_context(open_session(cut(second, names), threads=threads))
        inputs = {port.name for port in pieces.inputs}
        shown.start("diagnose", feeder.len_hint() or 0)
        for batch in feeder:
            truth = truth_of.run(feeds_for(truth_of, batch.feeds), wanted)
            seen = seen_of.run(feeds_for(seen_of, batch.feeds), wanted)
            given = {f"{name}{GIVEN}": truth[name] for name in names}
            own = pieces.run({k: v for k, v in {**batch.feeds, **given}.items() if k in inputs}, wanted)
            for name, sum_ in sums.items():
                sum_.add(np.asarray(truth[name]), np.asarray(seen[name]), np.asarray(own[name]))
            samples += batch.count
            shown.step(batch.count)
            if limit is not None and samples >= limit:
                break
        shown.done()
    return sums, samples


def _relative(squares: float, signal: float) -> float:
    return math.sqrt(squares) / signal if signal else (math.inf if squares else 0.0)


def _expected(
    keys: set[str],
    explained: Mapping[str, float],
    sums: Mapping[str, _Sums],
    two: Anatomy,
    name: str,
    common: set[str],
) -> float:
    """Relative error that rounding explains: of the weights, of the activations that come in, of what goes out."""
    total = FLOOR**2 + sum(explained.get(key, 0.0) ** 2 for key in keys)
    for value, step in _steps(two, name, common, sums):
        entry = sums.get(value)
        size = math.sqrt(entry.signal / entry.count) if entry is not None and entry.count else 0.0
        total += (step / math.sqrt(12) / size) ** 2 if size else 0.0
    return GAIN * math.sqrt(total)


def _steps(two: Anatomy, name: str, common: set[str], sums: Mapping[str, _Sums]) -> list[tuple[str, float]]:
    """The values quantized between `name` and what it is made of, each with the size of a step."""
    found, seen = [], set()
    waiting = [two.producers[name].producer()]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        source = node.inputs[0] if node.inputs else None
        known = two.name(source) if source is not None else ""
        known = known if known in sums else name
        if node.op_type == "QuantizeLinear" and len(node.inputs) > 1:
            scale = recognize.constant(node.inputs[1])
            if scale is not None:
                found.append((known, float(np.max(scale.numpy().astype(np.float64)))))
        elif node.op_type == "DynamicQuantizeLinear":
            entry = sums.get(known)
            if entry is not None:
                found.append((known, (entry.most - entry.least) / 255))
        inputs = [v for v in node.inputs if v is not None and two.key(v) is None and two.name(v) not in common]
        waiting += [value.producer() for value in inputs]
    return found


def _suspect(name: str, made: Made, proof: Verification) -> str:
    """What `verify` says of this layer, "" for nothing."""
    said = [
        f"{problem.where}: {problem.message}"
        for problem in proof.problems
        if problem.kind not in ("lint", "provenance")
        and (name in problem.layers[:1] or problem.where == name or problem.where in made.weights)
    ]
    return "; ".join(dict.fromkeys(said))


def _blame(rows: list[LayerRow], proof: Verification | None) -> list[tuple[str, str]]:
    """Layers with evidence in the order of the graph, then those that stand out, the worst first."""
    blamed = [(row.layer, row.suspect) for row in rows if row.suspect]
    shown = {layer for layer, _ in blamed}
    said = " ".join(reason for _, reason in blamed)
    if proof is not None:  # in a subgraph, where no value can be cut
        for problem in proof.problems:
            if problem.kind not in ("lint", "provenance") and problem.layers and problem.message not in said:
                blamed.append((problem.layers[0], f"{problem.where}: {problem.message}"))
                shown.add(problem.layers[0])
    for row in sorted(rows, key=lambda row: -row.excess):
        if row.excess > STANDS_OUT and row.layer not in shown:
            reason = (
                f"adds a relative error of {row.own:.3g} by itself, {row.excess:.3g} times what its encoding explains"
            )
            blamed.append((row.layer, reason))
    return blamed
