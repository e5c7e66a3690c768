"""Compares a file with its parent: every weight, the graph, the provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.encodings import Affine, Dense, Masked
from onnxcompress.linting import Linted, lint
from onnxcompress.model import provenance
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.sizes import saved_bytes
from onnxcompress.model.weights import Weight, weights
from onnxcompress.verification import activations, calibrated, structure
from onnxcompress.verification.judge import Judgement, judge
from onnxcompress.verification.references import EXACT, References
from onnxcompress.verification.result import Problem, Verification, WeightProof


def verify(
    out: Loadable,
    parent: Loadable,
    *,
    target: str = "cpu",
    calibration: Any = None,
    labels: str | None = None,
    mapping: Mapping[str, str] | None = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    limit: int | None = None,
    threads: int = 1,
) -> Verification:
    """Prove what can be proved of `out` without data: nothing is run.

    1. Every weight is decoded and compared, in float64, with the parent's; its error must be one that its encoding
       explains: half a step, the nearest codebook entry, zero where it was pruned, nothing where it is stored as it is.
    2. Every value that both graphs have is made of the same values and weights by the same operators.
    3. Q/DQ pairs agree with each other; integer biases with their layers.
    4. The recorded parent is `parent`; `target` takes the model (see `lint`).

    Rewrites that the recorded recipe names and that keep what a model computes are repeated on the parent first.
    Weights of a trained model are compared and not judged.

    `calibration`: the data that activations were quantized with; the parent is then run on it, and their scales must be
    those of its ranges. Without it they are not looked at. The rest: see `validate`.

    Raises:
        ModelError: a model cannot be loaded.
        DataError: the data does not fit the parent.
        RecipeError: no such target.
    """
    loaded, original = load(out), load(parent)
    found = provenance.read(loaded)
    held = weights(loaded)
    other = structure.Anatomy(loaded, held)
    references = References(original, found)
    rows, problems = _compared(held, references, other)
    if problems and (found is None or references.notes):  # what was done to it, it does not say
        again = References(original, found, exact=True)
        fewer = _compared(held, again, other)
        if len(fewer[1]) < len(problems):
            references, (rows, problems) = again, fewer
            references.notes.append(f"compared with the parent after the recipe {EXACT!r}")
    one = references.anatomy
    problems = _provenance(found, original) + problems
    notes = list(references.notes)
    if found is None:
        notes.append("no provenance: this file does not say what it was made from")
    if references.trained:
        notes.append("the recipe trains: the distance of weights from the parent's is told, not judged")
    problems += activations.check(loaded)
    if calibration is not None:
        settings: dict[str, Any] = {"labels": labels, "mapping": mapping, "preprocess": preprocess}
        data = open_data(calibration, input_specs(original), **settings, batch=batch, limit=limit)
        if found is not None and found.data and data.digest() != found.data:
            notes.append("the data given is not what the file was calibrated with: ranges were not compared")
        elif not references.calibrated_as_it_was:
            notes.append("activations were measured on a model that was compressed already: ranges were not compared")
        else:
            problems += calibrated.check(loaded, one, data.feeds(), threads)
    linted: Linted = lint(loaded, target)
    problems += [Problem("lint", f.node, f"{f.rule}: {f.message}; {f.mend}") for f in linted.errors]
    return Verification(
        weights=tuple(rows),
        problems=tuple(problems),
        notes=tuple(notes),
        parent=found.parent if found is not None else "",
        recipe=found.recipe if found is not None else "",
        bytes=saved_bytes(loaded),
        lint=linted,
    )


def _compared(
    held: Sequence[Weight], references: References, other: structure.Anatomy
) -> tuple[list[WeightProof], list[Problem]]:
    """Every weight and the graph, against one version of the parent."""
    rows = [_row(weight, references, other) for weight in held]
    problems = [Problem("weight", row.key, row.why, row.layers) for row in rows if not row.holds]
    problems += structure.compare(references.anatomy, other, references.folded, references.parameters)
    return rows, problems + _missing(rows, references, problems, other)


def _provenance(found: provenance.Provenance | None, parent: ir.Model) -> list[Problem]:
    source = source_of(parent)
    if found is None or not found.parent or source is None or found.parent == source.sha256:
        return []
    message = f"was made from another file: sha256 {found.parent[:16]}..., and this parent's is {source.sha256[:16]}..."
    return [Problem("provenance", "", message)]


def _layers(weight: Weight, anatomy: structure.Anatomy, known: structure.Anatomy) -> tuple[str, ...]:
    """Outputs of the operators that take a weight, or what they become under a name that `known` has, too."""
    found: list[str] = []
    waiting = [use.node.outputs[0] for use in weight.uses if use.node.outputs]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop(0)
        name = anatomy.name(value)
        users = [use.node for use in value.uses() if use.node.outputs]
        if name in known.producers or not users:
            found.append(name)
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += [node.outputs[0] for node in users]
    return tuple(dict.fromkeys(found))


def _row(weight: Weight, references: References, other: structure.Anatomy) -> WeightProof:
    encoding = weight.encoding
    layers = _layers(weight, other, references.anatomy)
    best: tuple[Judgement, str] | None = None
    for against, reference, pruned_as in _candidates(weight, references, other):
        if reference.shape != weight.shape:
            continue
        found = judge(encoding, reference, pruned_as=pruned_as)
        if best is None or (found.unexplained, found.error) < (best[0].unexplained, best[0].error):
            best = found, against
        if not found.unexplained:
            break
    found = best[0] if best is not None else _NOTHING
    unexplained = found.unexplained if best is not None else weight.size
    judged = not references.trained
    return WeightProof(
        key=weight.key,
        role=weight.role,
        encoding=encoding.kind,
        shape=weight.shape,
        bytes=weight.nbytes,
        against=best[1] if best is not None else "",
        error=found.error,
        largest=found.largest,
        expected=found.expected,
        unexplained=unexplained,
        judged=judged,
        holds=not (judged and unexplained),
        why=found.why,
        layers=layers,
    )


_NOTHING = Judgement(math.inf, math.inf, 0.0, 0, "the parent has no weight of this name and shape to compare it with")


def _candidates(
    weight: Weight, references: References, other: structure.Anatomy
) -> Sequence[tuple[str, np.ndarray, np.ndarray | None]]:
    """What the weight may be: (name, array, the parent's array where it is computed from that).

    Whether a convolution took in the BatchNormalization behind it, the graph says, as far as it kept the name. Found
    by whichever fits better, a weight that forgot to take it in would pass, and one that is wrong would be compared
    with what it is not made of.
    """
    found: list[tuple[str, np.ndarray, np.ndarray | None]] = []
    same = references.weights.get(weight.key)
    norm = next((name for name, key in references.folded.items() if key == weight.key), "")
    taken = _is_taken_in(norm, other)
    if same is not None and taken is not True:
        array = same.array()
        found.append(("parent", array, None))
        integers = isinstance(weight.encoding, Affine) and weight.encoding.form == "integer"
        if array.ndim == 2 and integers:
            found.append(("parent, transposed", np.ascontiguousarray(array.T), None))
    folded = references.computed(weight.key)
    if folded is not None and taken is not False:
        found.append(("parent with BatchNormalization", folded, same.array() if same is not None else folded))
    if isinstance(weight.encoding, Dense | Masked) and same is None and folded is None:
        found += [
            (f"parent's {key}", other.array(), None)
            for key, other in references.weights.items()
            if other.shape == weight.shape and other.dtype == weight.dtype
        ]
    return found


def _is_taken_in(norm: str, out: structure.Anatomy) -> bool | None:
    """Whether another operator makes what the parent's BatchNormalization of this output made; None: nothing does."""
    made = out.producers.get(norm)
    node = made.producer() if made is not None else None
    return None if node is None else node.op_type != "BatchNormalization"


def _missing(
    rows: Sequence[WeightProof], references: References, problems: Sequence[Problem], out: structure.Anatomy
) -> list[Problem]:
    """Weights of the parent that the file has no more, unless a BatchNormalization took them along."""
    there = {row.key for row in rows}
    taken: set[str] = set()
    for name, keys in references.parameters.items():
        if _is_taken_in(name, out) and f"{name}.bias" in there:
            taken |= keys
    said = " ".join(problem.message for problem in problems if problem.kind == "structure")
    found = []
    for key, weight in references.weights.items():
        if key in there or key in taken:
            continue
        layers = _layers(weight, references.anatomy, out)
        if key not in said:
            found.append(Problem("missing", key, "the file has this weight of the parent no more", layers))
    return found
