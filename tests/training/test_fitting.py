"""Teacher, student and data brought together: which outputs pair, fixed batches, precisions that differ."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.model.load import load
from onnxcompress.training import heads, matching
from onnxcompress.training.distill import Settings, distill
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, half, mlp, normalized, opened, sequences, tagger

ONCE = Settings(epochs=1)


def forked(*names: str) -> onnx.ModelProto:
    """x [n, 6] -> a Gemm [6, 4] for each output in `names`."""
    nodes = [node("Gemm", ["x", f"w_{name}"], [name], name=f"make_{name}") for name in names]
    given = {f"w_{name}": floats(6, 4, seed=i) for i, name in enumerate(names)}
    return model(graph(nodes, [info("x", ["n", 6])], [info(n, ["n", 4]) for n in names], tensors(**given)))


def test_outputs_pair_as_they_are_named() -> None:
    teacher, student, given = load(forked("p", "q")), load(forked("z")), {"x": arrays(64)["x"]}
    with pytest.raises(ModelError, match="do not pair; name them with --output STUDENT=TEACHER"):
        distill(teacher, student, opened(student, given))
    found = heads.pairs(heads.heads(student), heads.heads(teacher), ("z=q",))
    assert [(mine.output, theirs.output) for mine, theirs in found] == [("z", "q")]
    settings = Settings(epochs=40, lr=0.03, outputs=("z=q",))
    done = distill(teacher, student, opened(student, given), settings=settings)
    (other,) = (v for v in teacher.graph.initializers.values() if v.name == "w_q")
    assert other.const_value is not None
    assert np.abs(done.parameters["w_z"]["w"] - other.const_value.numpy()).mean() < 0.1
    with pytest.raises(ModelError, match="the teacher: --output z=r: has no such output, only p, q"):
        distill(teacher, student, opened(student, given), settings=Settings(outputs=("z=r",)))


def test_an_output_without_a_counterpart_is_told() -> None:
    teacher, student = load(forked("z", "p")), load(forked("z", "q"))
    done = distill(teacher, student, opened(student, {"x": arrays()["x"]}), settings=ONCE)
    assert done.losses == {"z": "squared error", "q": "not learned, the teacher has no such output"}
    with pytest.raises(ModelError, match="do not pair"):
        distill(teacher, student, opened(student, arrays()), settings=Settings(outputs=("z", "q")))


def test_integers_of_unknown_origin_are_no_head() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["z"]),
        node("Reshape", ["z", "flat"], ["r"]),
        node("Cast", ["r"], ["label"], to=onnx.TensorProto.INT64),
    ]
    given = tensors(w=floats(6, 1), flat=np.array([-1], np.int64))
    declared = [info("label", ["n"], onnx.TensorProto.INT64), info("z", ["n", 1])]
    of = load(model(graph(nodes, [info("x", ["n", 6])], declared, given)))
    assert [head.output for head in heads.heads(of)] == ["z"]


def test_a_fixed_batch_larger_than_what_is_left_of_the_data() -> None:
    student = load(mlp(batch=4))
    done = distill(None, student, opened(student, arrays(30), 4), settings=ONCE)  # one update, of 28 samples
    assert done.steps == 1
    with pytest.raises(DataError, match="holds 3 samples, and the model takes 4 a call"):
        distill(None, student, opened(student, arrays(3), 4), settings=ONCE)
    with pytest.raises(ModelError, match="the student takes 4 samples a call, the teacher 2"):
        distill(load(mlp(batch=2)), student, opened(student, arrays(30), 4), settings=ONCE)


def test_an_input_that_is_none_of_samples_is_refused() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("ReduceSum", ["state", "first"], ["s"], keepdims=0),
        node("Add", ["h", "s"], ["z"]),
    ]
    given = tensors(w=floats(6, 4), first=np.array([0], np.int64))
    inputs = [info("x", ["n", 6]), info("state", [2, 3, 4])]
    student = load(model(graph(nodes, inputs, [info("z", ["n", 4])], given)))
    calls = {"x": floats(8, 3, 6), "state": floats(8, 2, 3, 4)}
    with pytest.raises(DataError, match=r"different numbers of samples \('x' 3, 'state' 2\)"):
        distill(student, student, opened(student, calls), settings=ONCE)


@pytest.mark.parametrize("narrow", ["student", "teacher"])
def test_one_of_both_may_be_in_half_precision(narrow: str) -> None:
    wide, small = mlp(), half(mlp())
    teacher, student = (wide, small) if narrow == "student" else (small, wide)
    of = load(student)
    given = {"x": arrays()["x"]}
    done = distill(load(teacher), of, opened(of, given), settings=Settings(epochs=1, lr=1e-20))
    assert done.epochs[0].loss < 1e-5  # they are the same but for rounding


def test_labels_that_leave_every_sample_out_are_refused() -> None:
    student = load(mlp())
    with pytest.raises(DataError, match="every label is -100"):
        distill(None, student, opened(student, arrays() | {"y": np.full(64, -100)}), settings=ONCE)


def test_the_statistics_of_one_sample_are_refused() -> None:
    student = load(normalized())
    settings = Settings(batch=1, batch_norm="trained")
    with pytest.raises(PassError, match="BatchNormalization cannot be trained on batches of 1 sample"):
        distill(None, student, opened(student, arrays()), settings=settings)


def test_ranks_that_are_only_known_at_run_time() -> None:
    nodes = [
        node("Squeeze", ["x"], ["s"]),
        node("MatMul", ["s", "w"], ["h"]),
        node("Mul", ["h", "gain"], ["z"]),
        node("Softmax", ["z"], ["y"]),
    ]
    given = tensors(w=floats(6, 4), gain=np.array(1.5, np.float32))
    student = load(model(graph(nodes, [info("x", ["n", 1, 6])], [info("y", ["n", 4])], given)))
    data = {"x": arrays()["x"][:, None], "y": arrays()["y"]}
    done = distill(None, student, opened(student, data), settings=Settings(epochs=3, ema=0.9))
    assert done.epochs[-1].loss < done.epochs[0].loss


def test_labels_of_positions_are_as_long_as_their_sequences() -> None:
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 11, (1, length)) for length in (3, 7, 5, 7)]
    student, settings = load(tagger()), Settings(epochs=1, batch=4, lr=1e-20)

    def apart() -> Iterator[dict[str, np.ndarray]]:
        for each in ids:
            yield {"input_ids": each, "attention_mask": np.ones_like(each), "y": each % 3}

    given: dict[str, np.ndarray] = {n: np.zeros((4, 7), np.int64) for n in ("input_ids", "attention_mask")}
    given["y"] = np.full((4, 7), -100)
    for row, each in enumerate(ids):
        for name, values in (("input_ids", each), ("attention_mask", np.ones_like(each)), ("y", each % 3)):
            given[name][row, : each.shape[1]] = values
    read = open_data(apart, input_specs(student), batch=4, trim=False, last="fill")
    (ragged,) = distill(None, student, read, settings=settings).epochs
    (padded,) = distill(None, student, opened(student, given), settings=settings).epochs
    assert ragged.loss == pytest.approx(padded.loss, rel=1e-6)


def test_labels_that_some_calls_lack_are_refused() -> None:
    def calls() -> Iterator[dict[str, np.ndarray]]:
        for i in range(4):
            yield {"x": floats(2, 6, seed=i)} | ({"y": np.array([0, 1])} if i else {})

    student = load(mlp())
    read = open_data(calls, input_specs(student), batch=2, trim=False, last="fill")
    with pytest.raises(DataError, match="labels: 6 for 8 samples: all have them, or none"):
        distill(None, student, read, settings=ONCE)


def test_classes_stored_as_floats_are_classes() -> None:
    student, given = load(mlp()), arrays()
    done = distill(None, student, opened(student, given | {"y": given["y"].astype(np.float32)}), settings=ONCE)
    assert done.losses == {"z": "1 x cross-entropy"}
    with pytest.raises(DataError, match="fit no output"):
        distill(None, student, opened(student, given | {"y": given["y"] + np.float32(0.5)}), settings=ONCE)


def renamed(of: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    """The same model with inputs that are called otherwise."""
    made = onnx.ModelProto()
    made.CopyFrom(of)
    for value in made.graph.input:
        value.name = names[value.name]
    for each in made.graph.node:
        each.input[:] = [names.get(name, name) for name in each.input]
    return made


def test_inputs_of_other_names_pair_where_only_one_fits() -> None:
    student, given = load(mlp()), {"x": arrays()["x"]}
    teacher = load(renamed(mlp(), x="features"))
    assert matching.inputs_of(teacher, input_specs(student)) == {"features": "x"}
    done = distill(teacher, student, opened(student, given), settings=Settings(epochs=1, lr=1e-20))
    assert done.epochs[0].loss == 0
    wide = load(model(graph([node("MatMul", ["x", "w"], ["z"])], [info("x", ["n", 7])], [info("z", ["n", 4])],
                            tensors(w=floats(7, 4)))))  # fmt: skip
    with pytest.raises(ModelError, match=r"wants an input 'features' .* \(x\): .*--input STUDENT=features"):
        matching.inputs_of(teacher, input_specs(wide))


def test_inputs_of_one_type_pair_as_they_are_told() -> None:
    student = load(tagger())
    teacher = load(renamed(tagger(), input_ids="tokens", attention_mask="valid"))
    with pytest.raises(
        ModelError, match=r"wants an input 'tokens'.*name the one it is fed with, --input STUDENT=tokens"
    ):
        matching.inputs_of(teacher, input_specs(student))
    told = ("input_ids=tokens", "attention_mask=valid")
    assert matching.inputs_of(teacher, input_specs(student), told) == {"tokens": "input_ids", "valid": "attention_mask"}
    assert matching.inputs_of(teacher, input_specs(student), told[:1])["valid"] == "attention_mask"
    given, still = sequences(), Settings(epochs=1, lr=1e-20, inputs=told)
    done = distill(teacher, student, opened(student, given), settings=still)
    assert abs(done.epochs[0].loss) < 1e-6
    for text, message in [("ids=tokens", "the student has no such input, only input_ids, attention_mask"),
                          ("input_ids=ids", "the teacher has no such input, only tokens, valid")]:  # fmt: skip
        with pytest.raises(ModelError, match=f"--input {text}: {message}"):
            matching.inputs_of(teacher, input_specs(student), (text,))
    with pytest.raises(PassError, match="--input input_ids=tokens: names a teacher's input, and there is no teacher"):
        distill(None, student, opened(student, given | {"y": given["input_ids"] % 3}), settings=still)


def free(classes: int) -> onnx.ModelProto:
    """x [n, 6] -> z, whose second axis the file does not tell."""
    nodes = [node("MatMul", ["x", "w"], ["z"])]
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", "c"])], tensors(w=floats(6, classes))))


def test_a_free_axis_of_classes_is_compared_as_it_is() -> None:
    student = load(free(4))
    with pytest.raises(
        ModelError, match=r"the student's output 'z' is \[n, 4\], the teacher's 'z' is \[n, 5\]: they do"
    ):
        distill(load(free(5)), student, opened(student, {"x": arrays()["x"]}), settings=ONCE)
    done = distill(student, student, opened(student, {"x": arrays()["x"]}), settings=Settings(epochs=1, lr=1e-20))
    assert done.epochs[0].loss == 0


def brain(of: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A float32 model with weights rounded to bfloat16, and the same in bfloat16, inputs and outputs too."""
    plain, short = onnx.ModelProto(), onnx.ModelProto()
    plain.CopyFrom(of)
    short.CopyFrom(of)
    for wide, narrow in zip(plain.graph.initializer, short.graph.initializer, strict=True):
        array = onnx.numpy_helper.to_array(wide).astype(ml_dtypes.bfloat16)
        narrow.CopyFrom(onnx.numpy_helper.from_array(array, wide.name))
        wide.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), wide.name))
    for value in (*short.graph.input, *short.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    return plain, short


@pytest.mark.parametrize("narrow", ["student", "teacher", "both"])
def test_one_of_both_may_be_in_bfloat16(narrow: str) -> None:
    plain, short = brain(mlp())
    teacher, student = plain if narrow == "student" else short, plain if narrow == "teacher" else short
    of = load(student)
    given = {"x": arrays()["x"].astype(ml_dtypes.bfloat16).astype(np.float32)}
    done = distill(load(teacher), of, opened(of, given), settings=Settings(epochs=1, lr=1e-20))
    assert done.epochs[0].loss < 1e-12


def test_an_output_that_the_labels_pass_by_is_told() -> None:
    student, y = load(forked("a", "b")), np.arange(64) % 4
    data = opened(student, {"x": arrays(64)["x"], "y": y})
    done = distill(None, student, data, settings=ONCE)
    assert done.losses == {"a": "1 x cross-entropy", "b": "not learned, the labels are a's"}
    done = distill(None, student, data, settings=Settings(epochs=1, outputs=("b", "a")))
    assert done.losses == {"b": "1 x cross-entropy", "a": "not learned, the labels are b's"}
