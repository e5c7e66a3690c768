"""Files of other tools: what their weights are taken for, and that what is read is what ONNX Runtime computes."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from onnxcompress.encodings import Affine, Codebook, Sparse
from onnxcompress.errors import ModelError, PassError
from onnxcompress.model.weights import Weight, weights
from tests.builders import (
    FLOAT_ACTIVATIONS,
    by_key,
    checked,
    codebook,
    constant,
    floats,
    function,
    graph,
    halved,
    info,
    model,
    node,
    opened,
    run,
    same_bits,
    tensors,
)

X = floats(2, 3, 8, 8, seed=5)
ARRAYS = {
    "cw": floats(6, 3, 3, 3, seed=1),
    "cb": floats(6, seed=2),
    "mw": floats(384, 10, seed=3) / 20,
    "mb": floats(10, seed=4),
    "gw": floats(4, 10, seed=5),
    "gb": floats(4, seed=6),
}


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Three batches."""

    def __init__(self) -> None:
        self._batches = iter([{"x": floats(4, 3, 8, 8, seed=i)} for i in range(3)])

    def get_next(self) -> Any:
        return next(self._batches, None)


def network() -> onnx.ModelProto:
    """A new one each time: the quantizers change what they are given."""
    nodes = [
        node("Conv", ["x", "cw", "cb"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Flatten", ["r"], ["f"]),
        node("MatMul", ["f", "mw"], ["m"]),
        node("Add", ["m", "mb"], ["a"]),
        node("Gemm", ["a", "gw", "gb"], ["y"], transB=1),
    ]
    return model(graph(nodes, [info("x", ["n", 3, 8, 8])], [info("y", ["n", 4])], tensors(**ARRAYS)), 17)


def static(folder: pathlib.Path, form: Any, per_channel: bool) -> onnx.ModelProto:
    logging.disable(logging.WARNING)
    quantization.quantize_static(
        network(), folder / "q.onnx", Reader(), quant_format=form, per_channel=per_channel,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(folder / "q.onnx")


def close(weight: Weight, array: np.ndarray) -> bool:
    """Within half a step of 8 bits, by the coarsest scale."""
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    return bool(np.abs(np.asarray(weight.array()) - array).max() <= 0.51 * encoding.scale.max())


@pytest.mark.parametrize("per_channel", [False, True])
def test_static_qdq(per_channel: bool, tmp_path: pathlib.Path) -> None:
    proto = static(tmp_path, quantization.QuantFormat.QDQ, per_channel)
    found = opened(proto)
    keyed = by_key(found)
    suffix = "_DequantizeLinear_Output"
    assert {key.removesuffix(suffix): weight.role for key, weight in keyed.items()} == {
        "cw": "conv", "cb": "bias", "mw": "matmul", "mb": "bias", "gw": "gemm", "gb": "bias"
    }  # fmt: skip
    for key, weight in keyed.items():
        assert close(weight, ARRAYS[key.removesuffix(suffix)]), key
        assert isinstance(weight.encoding, Affine)
        assert weight.encoding.form == "dequantize-linear"
    axes = {key[:2]: keyed[key].encoding.structure()[0] for key in keyed}
    if per_channel:
        assert (axes["cw"], axes["mw"], axes["gw"]) == (0, 1, 0)
    for weight in keyed.values():
        name = weight.value.name or ""
        proto.graph.output.append(info(name, weight.shape))
    outputs = run(proto.SerializeToString(), {"x": X}, optimize=False)[1:]
    assert all(same_bits(a, np.asarray(w.array())) for a, w in zip(outputs, keyed.values(), strict=True))


def test_replace_in_a_quantized_file(tmp_path: pathlib.Path) -> None:
    """The weights share their zero point; each can go its own way, with its scale and integers gone."""
    found = opened(static(tmp_path, quantization.QuantFormat.QDQ, False))
    for weight in weights(found):
        array = np.asarray(weight.array())
        weight.replace(Sparse.pack(halved(array)) if weight.role == "conv" else codebook(array, 16))
    data = checked(found)
    kinds = {weight.key[:2]: weight.encoding.kind for weight in weights(found)}
    assert kinds == {
        "cw": "sparse",
        "cb": "codebook",
        "mw": "codebook",
        "mb": "codebook",
        "gw": "codebook",
        "gb": "codebook",
    }
    assert run(data, {"x": X})[0].shape == (2, 4)
    assert not [name for name in found.graph.initializers if name.endswith("_quantized")]


@pytest.mark.parametrize("per_channel", [False, True])
def test_static_operators(per_channel: bool, tmp_path: pathlib.Path) -> None:
    keyed = by_key(opened(static(tmp_path, quantization.QuantFormat.QOperator, per_channel)))
    assert {key: (w.role, w.axis(), w.encoding.kind) for key, w in keyed.items()} == {
        "cw": ("conv", 0, "affine"), "mw": ("matmul", 1, "affine"), "gw": ("gemm", 0, "affine")
    }  # fmt: skip
    for key, weight in keyed.items():
        assert close(weight, ARRAYS[key]), key
        with pytest.raises(PassError, match="its consumer takes integers"):
            weight.replace(codebook(ARRAYS[key], 4))


def test_dynamic(tmp_path: pathlib.Path) -> None:
    logging.disable(logging.WARNING)
    quantization.quantize_dynamic(network(), tmp_path / "q.onnx")
    keyed = by_key(opened(onnx.load(tmp_path / "q.onnx")))
    assert {key: (w.role, w.encoding.kind) for key, w in keyed.items()} == {
        "cw": ("conv", "affine"), "mw": ("matmul", "affine"), "gw_Transposed": ("matmul", "affine"),
        "cb": ("bias", "dense"), "mb": ("bias", "dense"), "gb": ("bias", "dense"),
    }  # fmt: skip
    assert close(keyed["cw"], ARRAYS["cw"])
    assert close(keyed["mw"], ARRAYS["mw"])
    assert close(keyed["gw_Transposed"], ARRAYS["gw"].T)


def test_blocks_of_four_bits() -> None:
    config = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=False, quant_format=quantization.QuantFormat.QDQ, bits=4
    )
    quantizer = MatMulNBitsQuantizer(network(), algo_config=config)
    quantizer.process()
    proto = quantizer.model.model
    keyed = by_key(opened(proto))
    (weight,) = (w for w in keyed.values() if w.role == "matmul")
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    assert (encoding.axis, encoding.block, encoding.q.dtype.name) == (0, 32, "uint4")
    assert encoding.nbytes == 384 * 10 // 2 + 12 * 10 * 4 + 12 * 10 // 2
    assert np.abs(weight.array() - ARRAYS["mw"]).max() <= 0.51 * encoding.scale.max()
    proto.graph.output.append(info(weight.value.name or "", weight.shape))
    assert same_bits(run(proto.SerializeToString(), {"x": X}, optimize=False)[1], np.asarray(weight.array()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_blocks_are_counted_and_left(symmetric: bool) -> None:
    """MatMulNBits lays integers out in a way of its own; its scales are no weights."""
    quantizer = MatMulNBitsQuantizer(network(), block_size=32, is_symmetric=symmetric)
    quantizer.process()
    keyed = by_key(opened(quantizer.model.model))
    assert keyed.keys() == {"cw", "cb", "mb", "gw", "gb", "mw_Q4"}
    packed = keyed["mw_Q4"]
    assert (packed.role, packed.encoding.kind, packed.dtype.name) == ("matmul", "affine", "float32")
    with pytest.raises(PassError, match="its consumer takes integers"):
        packed.replace(codebook(ARRAYS["mw"], 4))


def test_fake_quantized() -> None:
    """Quantization-aware training leaves float weights behind QuantizeLinear and DequantizeLinear."""
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=1),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    inits = tensors(w=floats(4, 5), s=np.linspace(0.01, 0.1, 5, dtype=np.float32), z=np.zeros(5, np.int8))
    keyed = by_key(opened(model(graph(nodes, [info("x", [3, 4])], [info("y", [3, 5])], inits))))
    assert {key: (w.role, w.axis()) for key, w in keyed.items()} == {"w": ("matmul", 1)}


def test_a_scale_that_is_a_weight_too() -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["a"]),
        node("Mul", ["a", "s"], ["y"]),
    ]
    inits = tensors(q=np.ones((4, 5), np.int8), s=floats(5))
    found = opened(model(graph(nodes, [info("x", [3, 4])], [info("y", [3, 5])], inits)))
    keyed = by_key(found)
    assert {key: w.role for key, w in keyed.items()} == {"w": "matmul", "s": "other"}
    keyed["w"].replace(Sparse.pack(np.asarray(keyed["w"].array())))
    x = floats(3, 4)
    assert np.allclose(run(checked(found), {"x": x})[0], x @ np.tile(floats(5), (4, 1)) * floats(5), rtol=1e-5)


def test_integers_expanded_for_each_consumer_are_one_weight() -> None:
    """As quantizers write tied weights: an embedding and the last layer."""
    nodes = [
        node("DequantizeLinear", ["w.q", "s"], ["w"]),
        node("Gather", ["w", "ids"], ["e"]),
        node("DequantizeLinear", ["w.q", "s"], ["w2"]),
        node("Transpose", ["w2"], ["t"], perm=[1, 0]),
        node("MatMul", ["e", "t"], ["y"]),
    ]
    q = np.arange(28, dtype=np.int8).reshape(7, 4)
    inits = tensors(w__q=q, s=np.array(0.5, np.float32))
    body = graph(nodes, [info("ids", [2], TensorProto.INT64)], [info("y", [2, 7])], inits)
    found = opened(model(body))
    (weight,) = weights(found)
    assert (weight.key, weight.nbytes) == ("w", 28 + 4)
    assert {use.role for use in weight.uses} == {"embedding", "matmul"}
    weight.replace(codebook(np.asarray(weight.array()), 28))
    assert {each.op_type for each in found.graph} == {"Depalettize8", "Gather", "Transpose", "MatMul"}
    assert set(found.graph.initializers) == {"w.codes", "w.codebook", "w.shape"}
    ids, w = np.array([6, 1]), q * 0.5
    assert np.allclose(run(checked(found), {"ids": ids})[0], w[ids] @ w.T, rtol=1e-6)


@pytest.mark.parametrize("opset", [10, 13, 21])
def test_forms_of_dequantize_linear(opset: int) -> None:
    """Constants from Constant nodes, a scale of one element, no zero point, an empty name for it, a negative axis."""
    q = np.arange(-10, 10, dtype=np.int8).reshape(4, 5)
    forms: dict[str, tuple[list[onnx.NodeProto], list[str], dict[str, Any]]] = {
        "a": ([], ["q", "s"], {}),
        "b": ([], ["q", "s", ""], {}),
        "c": ([constant("qc", q), constant("sc", np.array(0.3, np.float32))], ["qc", "sc"], {}),
    }
    if opset >= 13:
        forms["d"] = ([], ["q", "s5", "z5"], {"axis": -1})
        forms["e"] = ([], ["q", "s5", "z5"], {})  # the default axis is 1
        forms["f"] = ([], ["q", "s1"], {"axis": 0})
    nodes = [each for made, _, _ in forms.values() for each in made]
    nodes += [node("DequantizeLinear", inputs, [name], **attributes) for name, (_, inputs, attributes) in forms.items()]
    inits = tensors(
        q=q, s=np.array(0.7, np.float32), s1=np.array([0.9], np.float32),
        s5=np.linspace(0.1, 1, 5, dtype=np.float32), z5=np.arange(5, dtype=np.int8),
    )  # fmt: skip
    body = graph(nodes, [], [info(name, [4, 5]) for name in forms], inits)
    found = opened(model(body, opset, 8 if opset < 21 else 10))
    keyed = by_key(found)
    outputs = dict(zip(forms, run(checked(found), {}, optimize=False), strict=True))
    extra = {"s5"} if opset < 13 else set()  # nothing consumes it there
    assert keyed.keys() == forms.keys() | extra
    for name, output in outputs.items():
        assert same_bits(np.asarray(keyed[name].array()), output), name


def test_a_functions_own_domain_is_not_ours() -> None:
    """Another tool may use the domain for anything; only calls with the constants an encoding has are taken for one."""
    bodies = [
        function("Depalettize4", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])], domain="onnxcompress"),
        function("Fused", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])], domain="onnxcompress"),
    ]
    nodes = [
        node("Depalettize4", ["x", "w"], ["h"], domain="onnxcompress"),
        node("Fused", ["h", "v"], ["y"], domain="onnxcompress"),
    ]
    body = graph(nodes, [info("x", [3, 4])], [info("y", [3, 5])], tensors(w=floats(4, 4), v=floats(4, 5)))
    keyed = by_key(opened(model(body, functions=bodies, domains={"onnxcompress": 1})))
    assert {key: w.encoding.kind for key, w in keyed.items()} == {"w": "dense", "v": "dense"}


def test_constants_that_do_not_fit_are_an_error() -> None:
    body = graph([node("MatMul", ["x", "w"], ["y"])], [info("x", [3, 4])], [info("y", [3, 5])], tensors(w=floats(4, 5)))
    found = opened(model(body))
    by_key(found)["w"].replace(codebook(floats(4, 5), 16))
    for name, array in {"w.codes": np.zeros(3, np.uint8), "w.codebook": floats(0), "w.shape": np.array([7, 7])}.items():
        value = found.graph.initializers[name]
        kept = value.const_value
        value.const_value = ir.tensor(array, name=name)
        (weight,) = weights(found)
        with pytest.raises(ModelError, match="w: is no valid Depalettize4 of constants"):
            _ = weight.encoding
        value.const_value = kept
    assert isinstance(weights(found)[0].encoding, Codebook)


@pytest.mark.parametrize("where", ["graph", "branch"])
def test_parts_in_an_outer_scope(where: str) -> None:
    """Tools lift initializers of branches to the main graph; the parts of an encoding stay parts of it."""
    w = floats(4, 5)
    then = graph([node("MatMul", ["x", "w"], ["t"])], [], [info("t", [3, 5])], tensors(w=w), "then")
    other = graph([node("MatMul", ["x", "v"], ["e"])], [], [info("e", [3, 5])], tensors(v=w), "else")
    body = graph(
        [node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [info("c", [], TensorProto.BOOL), info("x", [3, 4])],
        [info("y", [3, 5])],
    )
    found = opened(model(body))
    new = {"y/then/w": codebook(w, 3, 1), "y/else/v": Sparse.pack(halved(w))}
    for key, weight in by_key(found).items():
        weight.replace(new[key])
    if where == "graph":
        for graph_ in found.graph.subgraphs():
            for value in list(graph_.initializers.values()):
                del graph_.initializers[value.name or ""]
                found.graph.register_initializer(value)
    keyed = by_key(found)
    assert keyed.keys() == new.keys()
    assert all(keyed[key].encoding.same(new[key]) for key in new)
    for weight in keyed.values():
        weight.replace(codebook(np.asarray(weight.array()), 4))
    assert not [v for v in found.graph.initializers if v.endswith(("mask", "values", "channel"))]
    feeds = {"c": np.array(True), "x": floats(3, 4)}
    assert run(checked(found), feeds, entries=FLOAT_ACTIVATIONS)[0].shape == (3, 5)
