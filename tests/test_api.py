"""The Python interface says what the command line says, and holds what it is asked to hold."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcompress as oc
from onnxcompress import api
from onnxcompress.api import Compressed, DataOptions
from onnxcompress.errors import DataError, MetricError, ModelError, NothingToDo, OnnxCompressError
from onnxcompress.model import provenance
from onnxcompress.model.save import to_bytes
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.weight_sharing import WeightSharing
from onnxcompress.validation.verdict import Verdict
from tests.builders import floats
from tests.house import BUNDLED, MODELS, Scale, accuracy, bundled, split, two_layers, untouched


def compressed(name: str, out: pathlib.Path | None = None, **options: Any) -> Compressed:
    given: dict[str, Any] = {"recipe": "small", "evaluate": split(name, "eval"), "metric": "accuracy", **options}
    return oc.compress(bundled(name), out=out, **given)


def test_everything_promised_is_there_and_loaded_on_first_use() -> None:
    for name in oc.__all__:
        assert callable(getattr(oc, name))
        assert name in dir(oc)
    with pytest.raises(AttributeError, match="nonesuch"):
        oc.nonesuch  # noqa: B018


def test_main_job_in_one_call(tmp_path: pathlib.Path) -> None:
    done = compressed("digits_cnn", tmp_path / "small.onnx", max_drop=0.02)
    file = tmp_path / "small.onnx"
    stated = json.loads((MODELS / "digits_cnn" / "model.json").read_text())["score"]
    assert done.bytes_before == bundled("digits_cnn").stat().st_size
    assert done.bytes_after == pytest.approx(file.stat().st_size, abs=2048)
    assert done.ratio == done.bytes_after / done.bytes_before <= 0.2
    assert done.score_before == pytest.approx(stated, abs=0.002)
    assert done.steps[0].score_before == done.score_before
    assert done.steps[1].score_before == done.steps[0].score
    assert done.steps[1].score == pytest.approx(accuracy("digits_cnn", file), abs=1e-9)
    assert done.steps[1].bytes_before == done.steps[0].bytes_after
    assert done.result is not None
    assert done.result.verdict is Verdict.PASS
    assert done.result.score is not None
    assert done.result.score.compressed == pytest.approx(done.steps[1].score)
    onnx.checker.check_model(onnx.load(file), full_check=True)


def test_report_is_plain_json(tmp_path: pathlib.Path) -> None:
    done = compressed("digits_gru", tmp_path / "o.onnx")
    report = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert report["schema"] == 1
    assert report["recipe"] == "small"
    assert [entry["name"] for entry in report["passes"]] == ["simplify", "weight-sharing"]
    for entry, step in zip(report["passes"], done.steps, strict=True):
        assert all({"weight", "bytes_before", "bytes_after"} <= set(touched) for touched in entry["touched"])
        assert all(set(left) == {"weight", "bytes", "reason", "detail"} for left in entry["left"])
        assert len(entry["touched"]) == len(step.coverage.touched)
        assert len(entry["left"]) == len(step.coverage.left) > 0
        assert entry["bytes_after"] == step.bytes_after
        assert entry["seconds"] >= 0
    assert report["validation"]["verdict"] == "PASS"


def test_without_out_nothing_is_written_and_the_model_stands_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = compressed("digits_cnn", recipe=[WeightSharing(bits=4)], max_drop=0.02)
    assert list(tmp_path.iterdir()) == []
    assert done.saved is None
    assert done.result is not None
    assert done.result.verdict is Verdict.PASS
    data = to_bytes(done.model)
    assert len(data) == pytest.approx(done.bytes_after, rel=0.01)
    assert accuracy("digits_cnn", data) >= 0.98
    saved = oc.save(done.model, tmp_path / "o.onnx")
    assert saved.path.stat().st_size == len(data)


def test_tensors_above_a_megabyte_survive_the_work_folder() -> None:
    proto = two_layers()
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(floats(16, 40_000), "first"))
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(floats(40_000, 8), "second"))
    done = oc.compress(proto, MagnitudePruning(sparsity=0.5))
    kept = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(to_bytes(done.model)).graph.initializer
    }
    assert sum(np.count_nonzero(kept[name]) for name in ("first", "second")) == 480_000


@pytest.mark.parametrize("form", ["path", "text", "bytes", "proto", "ir"])
def test_a_model_in_any_form_gives_the_same_file(form: str, tmp_path: pathlib.Path) -> None:
    path = bundled("digits_gru")
    forms = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "proto": onnx.load(path),
        "ir": oc.load(path),
    }
    oc.compress(path, WeightSharing(), out=tmp_path / "wanted.onnx")
    oc.compress(forms[form], WeightSharing(), out=tmp_path / "found.onnx")  # type: ignore[arg-type]
    wanted, found = (onnx.load(tmp_path / f"{name}.onnx") for name in ("wanted", "found"))
    if form == "proto":  # what a ModelProto was read from cannot be known
        for model in (wanted, found):
            del model.metadata_props[:]
    assert wanted.SerializeToString(deterministic=True) == found.SerializeToString(deterministic=True)


def test_recipe_in_any_form_is_the_same_work(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("passes:\n  - weight-sharing: {bits: 2}\n")
    forms: list[Any] = [
        file,
        str(file),
        {"passes": [{"weight-sharing": {"bits": 2}}]},
        [{"weight-sharing": {"bits": 2}}],
        [WeightSharing(bits=2)],
        WeightSharing(bits=2),
        oc.Recipe.load(file),
    ]
    for index, form in enumerate(forms):
        oc.compress(two_layers(), form, out=tmp_path / f"{index}.onnx")
    assert len({(tmp_path / f"{index}.onnx").read_bytes() for index in range(len(forms))}) == 1


def test_provenance_says_what_was_done_and_nothing_of_time_or_place(tmp_path: pathlib.Path) -> None:
    done = compressed("digits_gru", tmp_path / "o.onnx", calibration=split("digits_gru", "calib"), seed=5)
    found = provenance.read(oc.load(tmp_path / "o.onnx"))
    assert found is not None
    import hashlib

    assert found.parent == hashlib.sha256(bundled("digits_gru").read_bytes()).hexdigest()
    assert [entry["pass"] for entry in json.loads(found.recipe)] == ["simplify", "weight-sharing"]
    assert json.loads(found.recipe)[1]["bits"] == 4
    assert len(found.data) == 64
    assert found.seed == 5
    assert found.metrics == {"before": done.score_before, "after": done.steps[-1].score}
    assert str(tmp_path).encode() not in (tmp_path / "o.onnx").read_bytes()


def test_the_same_bytes_in_another_folder_with_other_threads(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    oc.compress(bundled("digits_gru"), "small", out=tmp_path / "a.onnx", threads=1)
    oc.compress(bundled("digits_gru"), "small", out=tmp_path / "deep" / "b.onnx", threads=2)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "deep" / "b.onnx").read_bytes()


# In place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [True, False])
def test_in_place_is_compared_with_the_original_not_with_itself(as_path: bool, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(bundled("digits_cnn").read_bytes())
    source = file if as_path else oc.load(file)
    settings: dict[str, Any] = {"evaluate": split("digits_cnn", "eval"), "metric": "accuracy", "max_drop": 0.02}
    done = oc.compress(source, WeightSharing(bits=1), out=file, **settings)
    assert done.result is not None
    assert done.result.verdict is Verdict.FAIL
    assert not done.result.same_bytes
    assert done.result.score is not None
    stated = json.loads((MODELS / "digits_cnn" / "model.json").read_text())["score"]
    assert done.result.score.original == pytest.approx(stated, abs=0.002)
    assert done.result.score.compressed < 0.5
    assert file.stat().st_size < 60_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_in_place_by_another_name(tmp_path: pathlib.Path) -> None:
    file, link = tmp_path / "model.onnx", tmp_path / "link.onnx"
    file.write_bytes(bundled("digits_gru").read_bytes())
    link.symlink_to(file)
    settings: dict[str, Any] = {"evaluate": split("digits_gru", "eval"), "metric": "accuracy"}
    done = oc.compress(link, WeightSharing(bits=1), out=file, **settings)
    assert done.result is not None
    assert not done.result.same_bytes


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_drop": 0.1}, MetricError, "--max-drop is the budget of a metric"),
        ({"metric": "accuracy"}, MetricError, "metric accuracy needs data"),
        ({"evaluate": split("digits_cnn", "eval")}, MetricError, "needs a metric"),
        ({"output": "logits"}, MetricError, "--output is the output a metric reads"),
        ({"evaluate": split("digits_cnn", "eval"), "metric": "acuracy"}, MetricError, "did you mean 'accuracy'"),
        (
            {"evaluate": split("digits_cnn", "eval"), "metric": "accuracy", "max_drop": float("nan")},
            MetricError,
            "at least 0",
        ),
        ({"evaluate": split("digits_cnn", "eval"), "metric": "accuracy", "max_drop": -0.1}, MetricError, "at least 0"),
        ({"evaluate": "nowhere.npz", "metric": "accuracy"}, DataError, "nowhere.npz"),
        ({"calibration": split("digits_gru", "calib")}, DataError, "image"),
        (
            {"evaluate": split("digits_cnn", "eval"), "metric": "accuracy", "output": "nowhere"},
            OnnxCompressError,
            "nowhere",
        ),
        (
            {
                "evaluate": split("digits_cnn", "eval"),
                "metric": "accuracy",
                "data_options": DataOptions(labels="nowhere"),
            },
            OnnxCompressError,
            "nowhere",
        ),
    ],
)
def test_questions_that_cannot_be_answered_are_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: pathlib.Path
) -> None:
    steps: list[Any] = []
    with pytest.raises(error, match=words):
        oc.compress(bundled("digits_cnn"), Scale(), out=tmp_path / "o.onnx", on_step=steps.append, **options)
    assert steps == []
    assert list(tmp_path.iterdir()) == []


def test_no_model_no_work(tmp_path: pathlib.Path) -> None:
    for source in (tmp_path / "none.onnx", tmp_path, b"", b"not a model"):
        with pytest.raises(ModelError):
            oc.compress(source, "small", out=tmp_path / "o.onnx")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_do_says_why(tmp_path: pathlib.Path) -> None:
    shared = WeightSharing(bits=4)
    with pytest.raises(NothingToDo, match=r"can touch none of the 3 weights: 2 x .*; 1 x bias"):
        oc.compress(two_layers(), MagnitudePruning(sparsity=0.0), out=tmp_path / "o.onnx", refuse_nothing=True)
    once = oc.compress(two_layers(), shared)
    with pytest.raises(NothingToDo, match="is stored as codebook"):
        oc.compress(once.model, shared, out=tmp_path / "o.onnx", refuse_nothing=True)
    tiny = two_layers()
    for tensor, array in zip(tiny.graph.initializer, (floats(16, 4), floats(4, 8), floats(8)), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    with pytest.raises(NothingToDo, match="would not become smaller"):
        oc.compress(tiny, shared, out=tmp_path / "o.onnx", refuse_nothing=True)
    assert list(tmp_path.iterdir()) == []
    done = oc.compress(tiny, shared, out=tmp_path / "o.onnx")  # without it the model is saved as it was
    assert not done.steps[0].coverage.changed
    assert (tmp_path / "o.onnx").exists()


def test_a_model_without_weights(tmp_path: pathlib.Path) -> None:
    from tests.builders import graph, info, model, node

    body = model(graph([node("Relu", ["x"], ["y"])], [info("x", [3])], [info("y", [3])]))
    with pytest.raises(NothingToDo, match="the model holds no weights"):
        oc.compress(body, WeightSharing(), refuse_nothing=True)
    assert untouched(oc.load(body.SerializeToString())) == []


def test_default_recipe_needs_nothing_but_a_model() -> None:
    for name in BUNDLED:
        done = oc.compress(bundled(name))
        assert done.recipe.name == api.DEFAULT_RECIPE
        assert done.ratio < 0.35
