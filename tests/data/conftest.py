"""Input specs and files the data tests share."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.data.specs import InputSpec

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


@pytest.fixture
def image() -> list[InputSpec]:
    return [InputSpec("x", F32, ("batch", 3, 4, 5))]


@pytest.fixture
def tokens() -> list[InputSpec]:
    return [InputSpec("ids", I64, ("batch", "seq")), InputSpec("attention_mask", I64, ("batch", "seq"))]


@pytest.fixture
def stateful() -> list[InputSpec]:
    return [
        InputSpec("input", F32, (None, None)),
        InputSpec("state", F32, (2, None, 8)),
        InputSpec("sr", I64, ()),
    ]


@pytest.fixture
def decoder() -> list[InputSpec]:
    """As decoders with a cache are exported."""
    past = ("batch", 2, "past_sequence_length", 4)
    return [
        InputSpec("input_ids", I64, ("batch", "sequence_length")),
        InputSpec("attention_mask", I64, ("batch", "total_sequence_length")),
        InputSpec("position_ids", I64, ("batch", "sequence_length")),
        InputSpec("past_key_values.0.key", F32, past),
        InputSpec("past_key_values.0.value", F32, past),
        InputSpec("use_cache_branch", np.dtype(bool), (1,)),
    ]
