"""Language models with a cache of keys and values, trained from texts alone."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxcompress as oc
from onnxcompress import healing
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.model.load import load
from onnxcompress.trainable import trainable
from onnxcompress.training import heads
from onnxcompress.training.distill import Settings, distill, write
from tests.decoder import GROUPS, PRESENT, SIZE, WORDS, decoder, texts

STILL = Settings(epochs=1, batch=64, lr=1e-20)


def _logits(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString())
    empty = np.zeros((len(feeds["input_ids"]), GROUPS, 0, SIZE), np.float32)
    past = {port.name: empty for port in session.get_inputs() if port.name.startswith("past")}
    found: np.ndarray = session.run(["logits"], {**feeds, **past})[0]
    return found


def _next_token_loss(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """In float64, over the tokens that a real one comes before."""
    z = _logits(model, feeds)[:, :-1].astype(np.float64)
    logs = z - z.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    picked = np.take_along_axis(logs, feeds["input_ids"][:, 1:, None], -1)[..., 0]
    real = (feeds["attention_mask"][:, 1:] * feeds["attention_mask"][:, :-1]).astype(bool)
    return float(-picked[real].mean())


@pytest.mark.parametrize("batch", [64, 16])
def test_next_tokens_are_learned_and_padding_counts_nowhere(batch: int) -> None:
    given = texts()
    expected = _next_token_loss(decoder(), given)
    spoiled = {**given, "input_ids": np.where(given["attention_mask"] == 1, given["input_ids"], 7)}
    for feeds in (given, spoiled):
        student = load(decoder())
        data = open_data(feeds, input_specs(student), batch=batch, trim=False)
        done = distill(None, student, data, settings=STILL)
        assert done.losses == {"logits": "1 x cross-entropy"}
        assert done.epochs[0].loss == pytest.approx(expected, rel=2e-5)


def test_the_cache_goes_back_in_and_is_learned_only_by_name() -> None:
    found = heads.heads(load(decoder()))
    assert [(head.output, head.is_state) for head in found] == [("logits", False), *((name, True) for name in PRESENT)]
    assert [head.output for head in heads.chosen(found, (), "it")] == ["logits"]
    assert [head.output for head in heads.chosen(found, ("logits", "present.1.key"), "it")] == ["logits", PRESENT[2]]


def test_what_is_trained_is_every_layer_and_no_table_of_angles() -> None:
    found = trainable(load(decoder()))
    assert set(found.left) == {"cos_cache", "sin_cache"}
    assert {"embed_tokens.weight", "layers.0.k_proj.weight", "norm.4", "lm_head.weight"} <= set(found.trained)
    assert not found.blocked


def test_it_learns_is_cut_and_healed(tmp_path: pathlib.Path) -> None:
    paths = {name: tmp_path / f"{name}.onnx" for name in ("start", "whole", "cut", "healed")}
    onnx.save(decoder(), paths["start"])
    given = texts(256)
    np.savez(tmp_path / "texts.npz", **given)  # type: ignore[arg-type]
    student = load(paths["start"])
    data = open_data(given, input_specs(student), batch=32, trim=False)
    write(student, distill(None, student, data, settings=Settings(epochs=40, lr=5e-3)).parameters)
    oc.save(student, paths["whole"])
    oc.compress(paths["whole"], [{"magnitude-pruning": {"sparsity": 0.6}}], out=paths["cut"])
    healing.train(
        paths["whole"], paths["cut"], paths["healed"], data=tmp_path / "texts.npz", settings=Settings(epochs=10)
    )
    whole, cut, healed = (_next_token_loss(onnx.load(paths[name]), given) for name in ("whole", "cut", "healed"))
    assert _next_token_loss(decoder(), given) > np.log(WORDS) > 2 * whole
    assert healed < whole + 0.25 * (cut - whole)
    for name in ("q_proj", "down_proj"):
        before, after = (
            next(t for t in onnx.load(paths[p]).graph.initializer if name in t.name) for p in ("cut", "healed")
        )
        zeros = onnx.numpy_helper.to_array(before) == 0
        assert zeros.mean() > 0.3
        assert not onnx.numpy_helper.to_array(after)[zeros].any()
