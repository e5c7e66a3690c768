from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.data.reach import index_bounds
from onnxcompress.data.sizes import IDS, candidate_sizes
from onnxcompress.data.specs import InputSpec, input_specs
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.errors import DataError


def model(inputs: str, body: str = "y = Identity(first)", outputs: str = "float[n] y", extra: str = "") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]>\ng ({inputs}) => ({outputs}) {extra} {{ {body} }}'
    )


LLM = model(
    "int64[batch,seq] input_ids, int64[batch,total] attention_mask, int64[batch,seq] position_ids,"
    " float[batch,4,past_seq,16] past_key_values_0_key, bool[1] use_cache_branch",
    "i = Cast <to: int = 7> (input_ids)  u = Identity(i)  e = Gather(table, u)  y = Identity(e)",
    "float[batch,seq,3] y",
    "<float[5,3] table = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}>",
)


def test_specs_leave_out_inputs_that_have_values() -> None:
    graph = model("float[n,2] first, float[1] w, int64 sr, string[-1] text", extra="<float[1] w = {1}>")
    specs = input_specs(graph)
    assert [spec.name for spec in specs] == ["first", "sr", "text"]
    assert specs[0] == InputSpec("first", np.dtype(np.float32), ("n", 2))
    assert (specs[1].shape, specs[2].dtype, specs[2].shape) == ((), np.dtype(object), (None,))
    assert specs[0].describe() == "float32[n, 2]"


def test_a_language_model_with_past() -> None:
    assert index_bounds(LLM) == {"input_ids": 5}
    calls = [batch.feeds for batch in synthetic_feeds(LLM)]
    for feeds, batch, past in zip(calls, (1, 2, 1, 2), (0, 0, 4, 4), strict=True):
        assert feeds["input_ids"].shape == (batch, 8)
        assert feeds["past_key_values_0_key"].shape == (batch, 4, past, 16)
        assert feeds["attention_mask"].shape == (batch, 8 + past)
        assert feeds["attention_mask"].all()
        assert feeds["position_ids"].tolist() == [list(range(past, past + 8))] * batch
        assert feeds["use_cache_branch"].tolist() == [past > 0]
    ids = np.concatenate([feeds["input_ids"].ravel() for feeds in calls])
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}


def test_a_sum_of_symbols_is_the_sum_of_their_sizes() -> None:
    graph = model(
        "int64[batch,sequence_length] first, int64[batch,k] attention_mask,"
        " float[batch,2,past_sequence_length,4] past_0_key"
    )
    # the text format keeps `a+1` as no symbol, so the shape is set by hand
    graph.graph.inputs[1].shape = ir.Shape(["batch", "past_sequence_length + sequence_length"])
    shapes = [batch.feeds["attention_mask"].shape for batch in synthetic_feeds(graph, sizes={"sequence_length": 3})]
    assert shapes == [(1, 3), (2, 3), (1, 7), (2, 7)]


def test_the_same_seed_makes_the_same_feeds() -> None:
    one, same, other = (synthetic_feeds(LLM, seed=seed).digest() for seed in (0, 0, 1))
    assert one == same != other


def test_values_suit_their_types_and_names() -> None:
    graph = model(
        "float[n,3,h,w] first, uint8[n,64] pixels, int64 sr, bool flag, string[n] text, int32[n,4] token_type_ids,"
        " float16[n] half, int64[n] lens, float[2,5] state, int64[n,4] ids"
    )
    calls = [batch.feeds for batch in synthetic_feeds(graph, batch=3)]
    assert calls[0]["first"].shape == (3, 3, 32, 32)
    assert abs(float(np.mean([np.std(feeds["first"]) for feeds in calls])) - 1) < 0.02
    pixels = np.stack([feeds["pixels"] for feeds in calls])
    assert pixels.min() < 10
    assert pixels.max() > 245
    assert {int(feeds["sr"]) for feeds in calls} == {16000}
    assert [bool(feeds["flag"]) for feeds in calls] == [True, False, True, False]
    assert calls[0]["text"].tolist() == ["a"] * 3
    assert not calls[0]["token_type_ids"].any()
    assert calls[0]["half"].dtype == np.float16
    assert all(0 <= feeds["ids"].min() <= feeds["ids"].max() < 100 for feeds in calls)
    assert {feeds["state"].shape for feeds in calls} == {(2, 5)}


def test_sizes_are_consistent_by_symbol_and_can_be_given() -> None:
    graph = model("float[n,t] first, float[n,t,4] other, float[2,?,8] state")
    graph.graph.inputs[2].shape = ir.Shape([2, None, 8])
    feeds = next(iter(synthetic_feeds(graph, batch=2, sizes={"t": 11}))).feeds
    assert {name: array.shape for name, array in feeds.items()} == {
        "first": (2, 11),
        "other": (2, 11, 4),
        "state": (2, 2, 8),
    }
    candidates = list(candidate_sizes(graph))
    assert candidates[0] == {}
    assert candidates[1] == {"n": 1, "state[1]": 1}
    assert {candidate["t"] for candidate in candidates[2:] if "t" in candidate} >= {8, 16, 32, 64, 128, 224, 512, 576}
    assert all(candidate["n"] == 1 for candidate in candidates[1:])


def test_fixed_shapes_leave_nothing_to_try_and_unknown_ones_get_one_value() -> None:
    graph = model("float[2,3] first")
    assert list(candidate_sizes(graph)) == [{}]
    assert {batch.count for batch in synthetic_feeds(graph, batch=7)} == {2}
    graph.graph.inputs[0].shape = None
    assert next(iter(synthetic_feeds(graph))).feeds["first"].shape == (1,)


def test_integers_nobody_bounds_can_be_made_small() -> None:
    graph = model("int64[n,50] first")
    assert {"n": 1, IDS: 2} in list(candidate_sizes(graph))
    assert list(candidate_sizes(graph))[-1] == {"n": 1, IDS: 1}
    values = {int(v) for batch in synthetic_feeds(graph, sizes={IDS: 2}) for v in batch.feeds["first"].ravel()}
    assert values == {0, 1}


def test_what_is_no_tensor_cannot_be_made_up() -> None:
    with pytest.raises(DataError, match="input 'first' is a sequence"):
        synthetic_feeds(model("seq(float[n]) first"))
