"""How many broken compressed models are caught, and how often the right layer is named first.

    python benchmarks/mutants.py [--count N] [--models NAME...] [--seed N] [--limit N] [--json FILE]

Every mutant is a compressed model in which one thing was broken at random: a weight's scale (or its codebook, or the
weight itself) times 1.05 to 8, two channels swapped, a zero point off by one, a bias dropped, one code off, a channel
zeroed, a square weight transposed. `verify` reads it beside the original, without data and with the calibration data;
what it lets pass goes to `validate` on the model's evaluation data; where a mutant's outputs are the same there is
nothing to see. A mutant counts as caught where `verify` does not hold or `validate` says FAIL. The right layer is one
that takes what was broken; `by outputs` is the diagnosis without the evidence of `verify`. Models are the bundled ones,
or, of the folder ONNXCOMPRESS_ZOO, those named with --models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import onnxcompress as oc
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.diagnosis import diagnose
from onnxcompress.encodings import Affine, Codebook, Dense, Encoding, Sparse, recognize
from onnxcompress.encodings.affine import limits
from onnxcompress.model import bridge
from onnxcompress.model.roles import WEIGHT_ROLES, Use
from onnxcompress.model.shapes import values
from onnxcompress.model.weights import Weight, weights
from onnxcompress.runtime.session import open_session
from onnxcompress.validation.verdict import Verdict
from onnxcompress.verification import verify

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
BUNDLED = ("digits_cnn", "digits_gru", "gloss_transformer")
FORMS: dict[str, list[Any]] = {
    "pruned": ["simplify", {"magnitude-pruning": {"sparsity": 0.5, "storage": "sparse"}}],
    "shared": ["simplify", {"weight-sharing": {"bits": 4}}],
    "dynamic": ["simplify", "dynamic-quantization"],
    "static": ["simplify", "static-quantization"],
}
FACTORS = (1.05, 1.2, 2.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Broken:
    """What was broken: the layers that take it, and how it is called."""

    layers: tuple[str, ...]
    what: str


class CannotBreak(Exception):
    """This model has nothing to break in this way."""


def layers_of(weight: Weight) -> tuple[str, ...]:
    """Outputs of the operators that take a weight."""
    return tuple(use.node.outputs[0].name or "" for use in weight.uses)


def pick(found: Sequence[Weight], rng: np.random.Generator, wanted: Callable[[Weight], bool]) -> Weight:
    """One of the weights of layers that are as wanted."""
    fit = [w for w in found if w.role in WEIGHT_ROLES and w.attribute is None and w.size >= 16 and wanted(w)]
    if not fit:
        raise CannotBreak
    return fit[rng.integers(len(fit))]


def put(weight: Weight, new: Encoding) -> None:
    """Store another encoding of the same form."""
    if isinstance(new, Affine) and new.form == "integer":
        overwrite(weight.value, new.q)
        return
    weight.replace(new)


def overwrite(value: ir.Value, array: np.ndarray) -> None:
    """Put other numbers into a constant."""
    node = value.producer()
    tensor = ir.tensor(array, name=value.name)
    if node is None:
        value.const_value = tensor
    else:
        node.attributes["value"] = ir.AttrTensor("value", tensor)


def stored(encoding: Encoding) -> np.ndarray:
    """What a file holds an element of: integers, codes, or the floats themselves."""
    if isinstance(encoding, Affine):
        return encoding.q.copy()
    return encoding.codes.copy() if isinstance(encoding, Codebook) else encoding.decode().copy()


def restored(encoding: Encoding, array: np.ndarray) -> Encoding:
    """The encoding with other integers, codes or floats."""
    if isinstance(encoding, Affine):
        return dataclasses.replace(encoding, q=array)
    if isinstance(encoding, Codebook):
        return dataclasses.replace(encoding, codes=array)
    return Sparse.pack(array) if isinstance(encoding, Sparse) else Dense(array)


def scale(model: ir.Model, rng: np.random.Generator) -> Broken:
    """A weight's scale (of one channel, half of the time), its codebook, or the weight itself, times a factor."""
    weight, factor = pick(weights(model), rng, lambda w: True), float(rng.choice(FACTORS))
    encoding, layers = weight.encoding, layers_of(weight)
    if isinstance(encoding, Affine):
        by = np.full(encoding.scale.shape, factor, encoding.scale.dtype)
        if by.ndim == 1 and rng.integers(2):
            by[:] = 1
            by[rng.integers(by.size)] = factor
        scaled = (encoding.scale * by).astype(encoding.scale.dtype)
        if encoding.form != "integer":
            weight.replace(dataclasses.replace(encoding, scale=scaled))
        else:
            value = scale_value(weight)
            tensor = recognize.constant(value)
            assert tensor is not None
            overwrite(value, scaled.reshape(tensor.numpy().shape))
    elif isinstance(encoding, Codebook):
        weight.replace(dataclasses.replace(encoding, table=(encoding.table * factor).astype(encoding.table.dtype)))
    else:
        put(weight, restored(encoding, (encoding.decode() * factor).astype(encoding.dtype)))
    return Broken(layers, f"{weight.key} scale x {factor}")


def scale_value(weight: Weight) -> ir.Value:
    """The constant that holds the scale of integers which their consumer takes."""
    graph, stem = weight.value.graph, recognize.stem_of(weight.value.name or "")
    assert isinstance(graph, ir.Graph)
    found = next((graph.initializers.get(stem + suffix) for suffix in (".scale", "_scale")), None)
    if found is None:
        raise CannotBreak
    return found


def swap(model: ir.Model, rng: np.random.Generator) -> Broken:
    """Two output channels of a weight swapped."""
    weight = pick(weights(model), rng, lambda w: w.axis() is not None and w.shape[w.axis() or 0] > 1)
    axis, array = weight.axis() or 0, stored(weight.encoding)
    one, other = rng.choice(array.shape[axis], 2, replace=False)
    moved = np.moveaxis(array, axis, 0)
    moved[[one, other]] = moved[[other, one]]
    broken = Broken(layers_of(weight), f"{weight.key} channels {one} and {other}")
    put(weight, restored(weight.encoding, array))
    return broken


def zero_point(model: ir.Model, rng: np.random.Generator) -> Broken:
    """The zero point of a weight or of an activation (QuantizeLinear and DequantizeLinear alike) off by one."""
    affine = [w for w in weights(model) if isinstance(w.encoding, Affine) and w.encoding.form != "integer"]
    pairs = [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 and recognize.constant(node.inputs[2]) is not None
    ]
    if not affine and not pairs:
        raise CannotBreak
    at = rng.integers(len(affine) + len(pairs))
    if at < len(affine):
        weight, layers = affine[at], layers_of(affine[at])
        encoding = weight.encoding
        assert isinstance(encoding, Affine)
        zero = np.zeros(encoding.scale.shape, encoding.q.dtype) if encoding.zero_point is None else encoding.zero_point
        weight.replace(dataclasses.replace(encoding, zero_point=(zero + np.ones((), zero.dtype)).astype(zero.dtype)))
        return Broken(layers, f"{weight.key} zero point")
    node = pairs[at - len(affine)]
    value, source = node.inputs[2], node.inputs[0]
    assert value is not None
    assert source is not None
    tensor = recognize.constant(value)
    assert tensor is not None
    held = tensor.numpy()
    moved = held - 1 if np.all(held == limits(held.dtype)[1]) else held + 1
    overwrite(value, moved.astype(held.dtype))
    fed = [use.node.outputs[0] for use in node.outputs[0].uses()]
    readers = [use.node.outputs[0].name or "" for value in fed for use in value.uses()]
    return Broken((source.name or "", *readers), f"{source.name} zero point")


def _is_bias(use: Use) -> bool:
    if use.node.op_type in ("Conv", "Gemm"):
        return use.index == 2
    return use.node.op_type == "Add" and not use.node.outputs[0].is_graph_output()


def bias(model: ir.Model, rng: np.random.Generator) -> Broken:
    """A bias dropped: the third input of a Conv or Gemm, or an Add of a constant vector."""
    found = [w for w in weights(model) if w.role == "bias" and np.any(w.array())]
    fit = [(weight, use.node) for weight in found for use in weight.uses if _is_bias(use)]
    if not fit:
        raise CannotBreak
    weight, node = fit[rng.integers(len(fit))]
    output = node.outputs[0]
    readers = tuple(use.node.outputs[0].name or "" for use in output.uses())
    broken = Broken((output.name or "", *(readers if node.op_type == "Add" else ())), f"{weight.key} dropped")
    if node.op_type != "Add":
        node.resize_inputs(2)
        return broken
    other = next(value for value in node.inputs if value is not None and recognize.constant(value) is None)
    output.replace_all_uses_with(other)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return broken


def code(model: ir.Model, rng: np.random.Generator) -> Broken:
    """One integer or code off by one; the neighbouring float where a weight is stored as it is."""
    weight = pick(weights(model), rng, lambda w: True)
    array, encoding = stored(weight.encoding), weight.encoding
    flat, at = array.reshape(-1), int(rng.integers(array.size))
    if isinstance(encoding, Affine):
        flat[at] = flat[at] + 1 if flat[at] < limits(array.dtype)[1] else flat[at] - 1
    elif isinstance(encoding, Codebook):
        flat[at] = flat[at] - 1 if flat[at] else 1
    else:
        flat[at] = np.nextafter(flat[at] + (flat[at] == 0) * np.float32(0.01), np.float32(9)).astype(array.dtype)
    broken = Broken(layers_of(weight), f"{weight.key}[{at}]")
    put(weight, restored(encoding, array))
    return broken


def zero(model: ir.Model, rng: np.random.Generator) -> Broken:
    """One output channel of a weight set to zero, or what comes nearest in its codebook."""
    weight = pick(weights(model), rng, lambda w: w.axis() is not None)
    axis, array, encoding = weight.axis() or 0, stored(weight.encoding), weight.encoding
    at = int(rng.integers(array.shape[axis]))
    none: Any = 0
    if isinstance(encoding, Codebook):
        table = encoding.table if encoding.axis is None or encoding.axis != axis else encoding.table[at]
        none = int(np.abs(table if table.ndim == 1 else table[0]).argmin())
    np.moveaxis(array, axis, 0)[at] = none
    broken = Broken(layers_of(weight), f"{weight.key} channel {at}")
    put(weight, restored(encoding, array))
    return broken


def transpose(model: ir.Model, rng: np.random.Generator) -> Broken:
    """A square weight transposed."""
    weight = pick(weights(model), rng, lambda w: len(w.shape) >= 2 and w.shape[0] == w.shape[1])
    broken = Broken(layers_of(weight), f"{weight.key} transposed")
    put(weight, restored(weight.encoding, np.ascontiguousarray(stored(weight.encoding).swapaxes(0, 1))))
    return broken


KINDS: dict[str, Callable[[ir.Model, np.random.Generator], Broken]] = {
    "scale": scale,
    "swapped channels": swap,
    "zero point": zero_point,
    "dropped bias": bias,
    "one code": code,
    "zeroed channel": zero,
    "transposed": transpose,
}


@dataclasses.dataclass
class Row:
    """What became of one mutant. `named`, `by_outputs`: the right layer was blamed first."""

    model: str
    form: str
    kind: str
    what: str
    differs: bool
    verify: bool = False
    calibrated: bool = False
    validate: bool = False
    named: bool = False
    by_outputs: bool = False
    first: str = ""


def outputs(model: pathlib.Path, original: ir.Model, data: pathlib.Path) -> list[np.ndarray]:
    """What a model gives for the first samples."""
    found = []
    with open_session(model) as session:
        for batch in open_data(data, input_specs(original), limit=64):
            found += [np.asarray(value) for value in session.run(batch.feeds).values()]
    return found


def known_as(model: ir.Model, layers: Sequence[str], original: pathlib.Path) -> set[str]:
    """The layers with the paths of their scopes; behind operators that the original does not have, what they become."""
    names = {f"{path}{v.name}" for path, owner in bridge.scopes(oc.load(original)) for v in values(owner)}
    made = {v.name: (f"{path}{v.name}", v) for path, owner in bridge.scopes(model) for v in values(owner)}
    found, waiting = set(), [made[name] for name in layers if name in made]
    while waiting:
        name, value = waiting.pop()
        found.add(name)
        if name not in names:
            waiting += [made[use.node.outputs[0].name] for use in value.uses() if use.node.outputs[0].name in made]
    return found


@dataclasses.dataclass
class Subject:
    """One compressed model to break. `calibration`, `evaluation`: data; `metric`: for `validate`, None without."""

    name: str
    form: str
    original: pathlib.Path
    path: pathlib.Path
    calibration: pathlib.Path
    evaluation: pathlib.Path
    metric: str | None
    outputs: list[np.ndarray]


def subjects(names: Sequence[str], folder: pathlib.Path) -> list[Subject]:
    """Every form of every model, made now; each must hold as it is."""
    found = []
    for name in names:
        home = MODELS / name if name in BUNDLED else pathlib.Path(os.environ["ONNXCOMPRESS_ZOO"]) / name
        kept = folder / name  # a copy: what stands there may change while this runs
        kept.mkdir()
        parts = ("model.onnx", "calib.npz", "eval.npz") if name in BUNDLED else ("model.onnx", "feeds.npz")
        for part in parts:
            shutil.copy(home / part, kept / part)
        original, calibration, evaluation = (kept / parts[min(i, len(parts) - 1)] for i in range(3))
        for form, recipe in FORMS.items():
            path = folder / f"{name}-{form}.onnx"
            oc.compress(original, {"passes": recipe}, out=path, calibration=calibration)
            proof = verify(path, original, calibration=calibration)
            if not proof.holds:
                print(f"{name} {form}: does not hold as it is: {proof.problems[0]}")
            blamed = diagnose(original, path, data=calibration, limit=16).blamed
            if blamed:
                print(f"{name} {form}: is blamed as it is: {blamed[0]}")
            metric = "accuracy" if name in BUNDLED else None
            before = outputs(path, oc.load(original), evaluation)
            found.append(Subject(name, form, original, path, calibration, evaluation, metric, before))
            print(f"{name} {form}: {path.stat().st_size:,} bytes", flush=True)
    return found


def run(subject: Subject, kind: str, rng: np.random.Generator, limit: int, folder: pathlib.Path) -> Row:
    """Break one, and look who notices."""
    model, path = oc.load(subject.path), folder / "mutant.onnx"
    broken = KINDS[kind](model, rng)
    oc.save(model, path)
    after = outputs(path, oc.load(subject.original), subject.evaluation)
    differs = any(not np.array_equal(a, b) for a, b in zip(subject.outputs, after, strict=True))
    layers = {*broken.layers, *known_as(model, broken.layers, subject.original)}
    row = Row(subject.name, subject.form, kind, broken.what, differs)
    row.verify = not verify(path, subject.original).holds
    row.calibrated = row.verify or not verify(path, subject.original, calibration=subject.calibration).holds
    if not row.calibrated and differs:
        given: dict[str, Any] = {"data": subject.evaluation, "latency": False, "limit": 512}
        if subject.metric is not None:
            given |= {"metric": subject.metric, "max_drop": 0.02}
        row.validate = oc.validate(subject.original, path, **given).verdict is Verdict.FAIL
    if differs:
        given = {"data": subject.calibration, "limit": limit, "calibration": subject.calibration}
        found = diagnose(subject.original, path, **given)
        row.first = found.blamed[0][0] if found.blamed else ""
        row.named = row.first in layers
        plain = diagnose(subject.original, path, **given, evidence=False)
        row.by_outputs = bool(plain.blamed) and plain.blamed[0][0] in layers
    return row


_COUNTED = ("verify", "calibrated", "validate", "named", "by_outputs")


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, a line a kind of mutant and one for all."""
    lines = [
        "| mutant | made | outputs differ | verify | with calibration | validate | caught | right layer | by outputs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        of = [row for row in rows if kind in ("all", row.kind)]
        seen = [row for row in of if row.differs]
        if not seen:
            continue
        counts = [sum(getattr(row, name) for row in seen) for name in _COUNTED]
        caught = sum(row.calibrated or row.validate for row in seen)
        lines.append(
            f"| {kind} | {len(of)} | {len(seen)} | {counts[0]} | {counts[1]} | {counts[2]} "
            f"| {caught} ({caught / len(seen):.1%}) | {counts[3]} ({counts[3] / len(seen):.1%}) "
            f"| {counts[4]} ({counts[4] / len(seen):.1%}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the mutants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=list(BUNDLED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=16, help="samples for the diagnosis")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = subjects(given.models, folder)
        turn, barren = 0, Counter[tuple[int, str]]()
        while len(rows) < given.count:
            kind = list(KINDS)[turn % len(KINDS)]
            at = (turn // len(KINDS)) % len(made)
            turn += 1
            try:
                row = run(made[at], kind, rng, given.limit, folder)
            except CannotBreak:
                barren[at, kind] += 1
                continue
            rows.append(row)
            if row.differs and not ((row.calibrated or row.validate) and row.named):
                print(f"{row.model} {row.form} {kind}: {row.what}: verify {row.calibrated}, validate {row.validate}, "
                      f"blamed {row.first!r}", flush=True)  # fmt: skip
    print(f"\n{table(rows)}")
    if given.json is not None:
        given.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
