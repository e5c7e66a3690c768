"""Our gradients against those PyTorch computed in float64 (`witness.py`): a second witness beside finite differences.

Finite differences say that a gradient is that of the operator as the reference evaluator has it; PyTorch knows nothing
of either.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from onnxcompress.autodiff.rule import RULES, ZERO
from tests.autodiff.checking import gradient_model, reference, relative, session

FILE = pathlib.Path(__file__).with_name("witness.npz")
# What PyTorch was not asked: control flow is its host language, the rest it has not, or not with a gradient.
ELSEWHERE = {"If", "Loop", "Scan", "Cast", "CastLike", "Dropout", "DynamicQuantizeLinear", "RoiAlign"}
# Graphs hold their constants in float32: 1/3, 2/sqrt(pi) and the like are 2^-25 off even when computed in float64.
ROUNDED = {"AveragePool", "BatchNormalization", "BiasGelu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "LRN", "Mean"}
ROUNDED |= {"QuantizeLinear", "QuickGelu", "Selu"}


@dataclasses.dataclass
class Witness:
    """One model, with the gradients of the sum of its float outputs, each weighted by its seed."""

    name: str
    run: bool  # whether ONNX Runtime has a kernel
    dynamic: bool
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    seeds: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    def __str__(self) -> str:
        return self.name


def witnesses() -> Iterator[Witness]:
    """All of them, out of the arrays that hold everything of one type."""
    stored = np.load(FILE, allow_pickle=False)
    flat = {name: stored[name] for name in stored.files if name != "index"}
    at = dict.fromkeys(flat, 0)

    def take(described: dict[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
        found = {}
        for name, (dtype, shape) in described.items():
            size = int(np.prod(shape))
            found[name] = flat[dtype][at[dtype] : at[dtype] + size].reshape(shape)
            at[dtype] += size
        return found

    for row in json.loads(stored["index"].tobytes())["cases"]:
        model = onnx.load_from_string(take(row["model"])[""].tobytes())
        arrays = [take(row[kind]) for kind in ("feeds", "seeds", "gradients")]
        yield Witness(row["name"], row["run"], row["dynamic"], model, *arrays)


WITNESSES = list(witnesses())


def free(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with every dimension of its inputs free."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        for i, dim in enumerate(info.type.tensor_type.shape.dim):
            dim.dim_param = f"{info.name}_{i}"
    return copy


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("witness", WITNESSES, ids=str)
def test_pytorch_agrees(witness: Witness, dynamic: bool) -> None:
    """In float64 to 1e-9 of the largest element, but for constants in float32; ONNX Runtime to 1e-5."""
    op = witness.model.graph.node[0].op_type
    exact = 1e-7 if op in ROUNDED else 1e-6 if op == "Resize" else 1e-9  # the evaluator rounds where cubic samples lie
    if dynamic and not witness.dynamic:
        return
    model = free(witness.model) if dynamic else witness.model
    built, names = gradient_model(model, witness.seeds, list(witness.gradients))
    assert set(names) == set(witness.gradients)
    given = {**witness.feeds, **{f"seed/{name}": seed for name, seed in witness.seeds.items()}}
    for name, found in zip(names, reference(built, given, list(names.values())), strict=True):
        error = relative(found, witness.gradients[name])
        assert error <= exact, f"gradient of {name}: off by {error:.2g}\n{found}\n{witness.gradients[name]}"
    if witness.run:
        for name, found in zip(names, session(built).run(list(names.values()), given), strict=True):
            error = relative(found, witness.gradients[name])
            assert error <= 1e-5, f"gradient of {name}: ONNX Runtime is off by {error:.2g}"


def test_pytorch_was_asked_about_every_rule_it_can_judge() -> None:
    asked = {(node.domain, node.op_type) for witness in WITNESSES for node in witness.model.graph.node}
    missing = {op for domain, op in RULES if not domain and (domain, op) not in asked | ZERO} - ELSEWHERE
    assert missing == set()


def test_file_is_small() -> None:
    assert FILE.stat().st_size < 300 * 1024
