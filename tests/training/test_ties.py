"""Vectors merged by an exporter train by themselves; what an author tied stays tied."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training.distill import Settings, Trained, distill, write
from onnxcompress.training.ties import untie
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, opened, outputs

ONES, ZEROS = np.ones(8, np.float32), np.zeros(8, np.float32)
MERGED = {"ln2.scale": "ln1.scale", "ln2.shift": "ln1.shift"}


def norms(ties: str) -> onnx.ModelProto:
    """x -> MatMul -> LayerNormalization -> MatMul -> LayerNormalization -> MatMul = z; `ties`: "", identity, direct."""
    own = {"ln1.scale": ONES, "ln1.shift": ZEROS}
    name = {key: key for key in (*own, *MERGED)}
    nodes = []
    if ties == "identity":
        nodes = [node("Identity", [first], [second], name=f"Identity {second}") for second, first in MERGED.items()]
    elif ties == "direct":
        name |= MERGED
    else:
        own |= {"ln2.scale": ONES, "ln2.shift": ZEROS}
    nodes += [
        node("MatMul", ["x", "w1"], ["a"], name="one"),
        node("LayerNormalization", ["a", name["ln1.scale"], name["ln1.shift"]], ["b"], name="ln1"),
        node("MatMul", ["b", "w2"], ["c"], name="two"),
        node("LayerNormalization", ["c", name["ln2.scale"], name["ln2.shift"]], ["d"], name="ln2"),
        node("MatMul", ["d", "w3"], ["z"], name="three"),
    ]
    layers = {"w1": floats(6, 8, seed=1), "w2": floats(8, 8, seed=2), "w3": floats(8, 4, seed=3)}
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], tensors(**layers, **own)))


def trained(of: ir.Model) -> Trained:
    return distill(None, of, opened(of, arrays(64)), settings=Settings(epochs=3, batch=16, lr=1e-2))


def test_merged_vectors_train_as_if_they_had_never_been_merged() -> None:
    apart = load(norms(""))
    wanted = trained(apart)
    write(apart, wanted.parameters)
    for ties in ("identity", "direct"):
        of = load(norms(ties))
        assert len(weights(of)) == 5
        done = trained(of)
        assert len(done.parameters) == 7
        names = {key: key for key in wanted.parameters}
        if ties == "direct":
            names |= {"ln2.scale": "ln1.scale_1", "ln2.shift": "ln1.shift_1"}
        for key, parts in wanted.parameters.items():
            np.testing.assert_array_equal(done.parameters[names[key]]["w"], parts["w"])
        assert not np.array_equal(done.parameters["ln1.scale"]["w"], done.parameters[names["ln2.scale"]]["w"])
        assert {weight.key for weight in weights(of)} == {"w1", "w2", "w3", "ln1.scale", "ln1.shift"}  # not changed
        write(of, done.parameters)
        np.testing.assert_array_equal(
            outputs(of, {"x": arrays(64)["x"]})["z"], outputs(apart, {"x": arrays(64)["x"]})["z"]
        )


def test_untying_changes_no_output_and_leaves_no_identity() -> None:
    of = load(norms("identity"))
    before = outputs(of, {"x": arrays(8)["x"]})["z"]
    assert untie(of) == MERGED
    assert not any(n.op_type == "Identity" for n in of.graph)
    np.testing.assert_array_equal(outputs(of, {"x": arrays(8)["x"]})["z"], before)


def test_what_an_author_tied_stays_tied() -> None:
    """A matrix through Identity, and a vector with values of its own that two nodes use."""
    nodes = [
        node("Identity", ["w"], ["w.again"], name="tie"),
        node("MatMul", ["x", "w"], ["a"], name="one"),
        node("LayerNormalization", ["a", "scale", "shift"], ["b"], name="ln1"),
        node("MatMul", ["b", "w.again"], ["c"], name="two"),
        node("LayerNormalization", ["c", "scale", "shift"], ["z"], name="ln2"),
    ]
    given = {"w": floats(6, 6, seed=1), "scale": floats(6, seed=2) + 1, "shift": floats(6, seed=3)}
    of = load(model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 6])], tensors(**given))))
    assert untie(of) == {}
    data = opened(of, {"x": arrays(32)["x"]})
    teacher = bridge.clone(of)
    done = distill(teacher, of, data, settings=Settings(epochs=1))
    assert done.parameters.keys() == {"w", "scale", "shift"}
