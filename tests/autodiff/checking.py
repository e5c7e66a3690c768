"""Check a gradient graph: against finite differences in float64 (onnx.reference), and ONNX Runtime against that.

Stock ONNX Runtime has no float64 kernels for a dozen operators, so the float64 truth comes from the reference
evaluator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcompress.autodiff import gradients
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.model import bridge
from tests.autodiff.truth import OWN

Feeds = Mapping[str, np.ndarray]
SINGLE, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


@dataclasses.dataclass
class Errors:
    """Largest relative error of the gradient graph in float64, and of ONNX Runtime in float32 against it."""

    exact: float
    runtime: float


def model_of(
    nodes: Sequence[onnx.NodeProto],
    feeds: Feeds,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    constants: Feeds | None = None,
    dynamic: bool = False,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model of `nodes`, its inputs typed by `feeds`. `dynamic`: every dimension of an input is free."""
    infos = []
    for name, array in feeds.items():
        shape = [f"{name}_{i}" for i in range(array.ndim)] if dynamic else list(array.shape)
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", infos, results, initializers)
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(d, v) for d, v in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def gradient_model(model: onnx.ModelProto, seeds: Feeds, wrt: Sequence[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """`model` with its gradient graph; every seed is an input `seed/<output>`. And: name -> its gradient's name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    built = bridge.from_proto(copy, "test")
    for name, array in seeds.items():
        value = ir.Value(name=f"seed/{name}", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        built.graph.inputs.append(value)
    found = gradients(built, {name: f"seed/{name}" for name in seeds}, wrt)
    names = {}
    for name, value in found.items():
        names[name] = str(value.name)
        if not value.is_graph_output():
            built.graph.outputs.append(value)
    return bridge.to_proto(built), names


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` as the engine sees it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    built = bridge.from_proto(copy, "test")
    prepare(built)
    return bridge.to_proto(built)


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model computing in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _graph_to_double(copy.graph)
    for function in copy.functions:
        for node in function.node:
            _node_to_double(node)
    return copy


def _graph_to_double(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _tensor_to_double(tensor)
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == SINGLE:
            info.type.tensor_type.elem_type = DOUBLE
    for node in graph.node:
        _node_to_double(node)


def _node_to_double(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _graph_to_double(attribute.g)
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _tensor_to_double(attribute.t)
        elif node.op_type in ("Cast", "EyeLike", "QuantizeLinear") and attribute.name in ("to", "dtype"):
            if attribute.i == SINGLE:
                attribute.i = DOUBLE
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = [attribute.f] if attribute.name == "value_float" else list(attribute.floats)
            array = np.array(values if attribute.name == "value_floats" else values[0], np.float64)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))
    if node.op_type == "EyeLike" and not any(a.name == "dtype" for a in node.attribute):
        node.attribute.append(helper.make_attribute("dtype", DOUBLE))


def _tensor_to_double(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == SINGLE:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), name))


def evaluator_of(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The reference evaluator of `model` in float64."""
    return ReferenceEvaluator(to_double(model), new_ops=OWN)


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def reference(model: onnx.ModelProto, feeds: Feeds, names: Sequence[str]) -> list[np.ndarray]:
    """Values of `model` computed in float64."""
    found = evaluator_of(model).run(list(names), {n: _double(a) for n, a in feeds.items()})
    return [np.asarray(array) for array in found]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest difference in units of the largest true element."""
    if found.shape != truth.shape:
        raise AssertionError(f"shape {found.shape}, expected {truth.shape}")
    if not truth.size:
        return 0.0
    scale = max(float(np.abs(truth).max()), 1e-3)
    return float(np.abs(found.astype(np.float64) - truth).max()) / scale


def check(
    model: onnx.ModelProto,
    feeds: Feeds,
    wrt: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    exact: float = 1e-6,
    runtime: float = 1e-5,
    step: float = 1e-5,
    run: bool = True,
    directions: int | None = None,
    missing: Sequence[str] = (),
    defined: bool = False,
    lenient: bool = False,
) -> Errors:
    """Assert that the gradients of random sums of the float outputs are right, and return the errors.

    `wrt`: defaults to all float inputs. `directions`: random directions instead of every element (default: elements
    up to 64 of them). `missing`: those of `wrt` that must get no gradient. `defined`: the reference evaluator computes
    the operator in float32, so the differences are taken of its definition by other operators. That the outputs are
    still what they were is checked in any case. `lenient`: any of `wrt` may get no gradient.
    """
    rng = np.random.default_rng(0)
    feeds = {name: np.asarray(array) for name, array in feeds.items()}
    floats = [name for name, array in feeds.items() if array.dtype == np.float32]
    wrt = list(wrt if wrt is not None else floats)
    every = [output.name for output in model.graph.output]
    subject = prepared(model) if defined else model
    forward = reference(subject, feeds, every)
    chosen = [
        n for n, a in zip(every, forward, strict=True) if a.dtype == np.float64 and (outputs is None or n in outputs)
    ]
    truth = dict(zip(every, forward, strict=True))
    seeds = {name: rng.uniform(0.5, 1.5, truth[name].shape).astype(np.float32) for name in chosen}
    built, names = gradient_model(model, seeds, wrt)
    assert lenient or set(names) == set(wrt) - set(missing), (
        f"gradients of {sorted(names)}, wanted {wrt} without {missing}"
    )
    given = {**feeds, **{f"seed/{name}": array for name, array in seeds.items()}}
    found = dict(zip(names, reference(built, given, list(names.values())), strict=True))

    evaluator = evaluator_of(subject)

    def loss(moved: Mapping[str, Any]) -> float:
        results = evaluator.run(chosen, {**{n: _double(a) for n, a in feeds.items()}, **moved})
        return float(sum((r * seeds[n].astype(np.float64)).sum() for n, r in zip(chosen, results, strict=True)))

    worst = Errors(0.0, 0.0)
    for name, gradient in found.items():
        base = _double(feeds[name])
        assert gradient.shape == base.shape, f"gradient of {name} has shape {gradient.shape}, not {base.shape}"
        count = directions if directions is not None else (0 if base.size <= 64 else 5)
        if count:
            moves = [rng.standard_normal(base.shape) for _ in range(count)]
        else:
            moves = [row.reshape(base.shape) for row in np.eye(base.size)]
        slopes = []
        for move in moves:
            up, down = loss({name: base + step * move}), loss({name: base - step * move})
            slopes.append((up - down) / (2 * step))
        projected = np.array([(gradient * move).sum() for move in moves])
        error = relative(projected, np.array(slopes))
        worst.exact = max(worst.exact, error)
        assert error <= exact, f"gradient of {name}: off by {error:.2g} in float64\n{projected}\n{np.array(slopes)}"
    if run and names:
        now = session(built)
        plain = session(model).run(every, dict(feeds))
        for name, before, after in zip(every, plain, now.run(every, dict(given)), strict=True):
            if np.asarray(before).dtype == np.float32:
                assert relative(before, truth[name]) < 1e-4, f"the reference evaluator has another {name}"
                assert relative(after, before.astype(np.float64)) < 2e-6, f"preparing the model changed {name}"
        results = now.run(list(names.values()), dict(given))
        for name, result in zip(names, results, strict=True):
            error = relative(result, found[name])
            worst.runtime = max(worst.runtime, error)
            assert error <= runtime, f"gradient of {name}: ONNX Runtime is off by {error:.2g}"
    return worst
