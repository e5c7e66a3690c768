"""Language models with a cache of keys and values, trained from texts alone."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import onnxcompress as oc
from onnxcompress import healing
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.model.load import load
from onnxcompress.trainable import trainable
from onnxcompress.training import heads
from onnxcompress.training.distill import Settings, distill
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


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model that has learned `texts(256)`, and these."""
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(decoder(), folder / "start.onnx")
    np.savez(folder / "texts.npz", **texts(256))  # type: ignore[arg-type]
    healing.train(
        None,
        folder / "start.onnx",
        folder / "whole.onnx",
        data=folder / "texts.npz",
        settings=Settings(epochs=40, lr=5e-3),
    )
    return folder


def _healed(learned: pathlib.Path, cut: pathlib.Path, epochs: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The model at `cut` before and after it learned from the whole one; it must be most of the way back."""
    out = cut.with_name("healed.onnx")
    healing.train(
        learned / "whole.onnx", cut, out, data=learned / "texts.npz", settings=Settings(epochs=epochs), threads=1
    )
    before, after = onnx.load(cut), onnx.load(out)
    lost = [_next_token_loss(model, texts(256)) for model in (onnx.load(learned / "whole.onnx"), before, after)]
    assert _next_token_loss(decoder(), texts(256)) > np.log(WORDS) > 2 * lost[0]
    assert lost[1] > lost[0]
    assert lost[2] < lost[0] + 0.25 * (lost[1] - lost[0])
    return before, after


def _arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_it_is_cut_and_healed(learned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    oc.compress(learned / "whole.onnx", [{"magnitude-pruning": {"sparsity": 0.6}}], out=tmp_path / "cut.onnx")
    before, after = map(_arrays, _healed(learned, tmp_path / "cut.onnx", 10))
    for name in ("layers.0.q_proj.weight", "layers.1.down_proj.weight"):
        zeros = before[name] == 0
        assert zeros.mean() > 0.3
        assert not after[name][zeros].any()
        assert not np.array_equal(before[name], after[name])


def test_in_blocks_of_4_bits_it_is_healed_in_them(learned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(learned / "whole.onnx"), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "blocks.onnx")
    before, after = _healed(learned, tmp_path / "blocks.onnx", 40)
    assert [(node.domain, node.op_type) for node in before.graph.node] == [
        (node.domain, node.op_type) for node in after.graph.node
    ]
    arrays = [_arrays(model) for model in (before, after)]
    assert {name: array.dtype for name, array in arrays[0].items()} == {n: a.dtype for n, a in arrays[1].items()}
    packed = [name for name, array in arrays[0].items() if array.dtype == np.uint8]
    assert len(packed) == 15
    assert any(not np.array_equal(arrays[0][name], arrays[1][name]) for name in packed)
