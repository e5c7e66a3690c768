"""A small language model as onnxruntime-genai writes them: grouped attention, rotary positions, a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
WORDS, WIDTH, HEADS, GROUPS, SIZE, HIDDEN, LONGEST = 19, 32, 4, 2, 16, 48, 32
PRESENT = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]


class _Writer:
    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        drawn = self._generator.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        return self.constant(name, drawn)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        made = helper.make_node(op, inputs, list(outputs), name=f"{outputs[0]}/{op}", domain=domain, **attributes)
        self.nodes.append(made)
        return outputs[0]


def decoder(seed: int = 0, layers: int = 2) -> onnx.ModelProto:
    """input_ids [B, S], attention_mask [B, P + S], past_key_values.* [B, groups, P, size] -> logits [B, S, words],
    present.*; opset 14, SimplifiedLayerNormalization in the standard's domain as ONNX Runtime has it."""
    w = _Writer(seed)
    past: list[str | int] = ["batch_size", GROUPS, "past_sequence_length", SIZE]
    total: list[str | int] = ["batch_size", GROUPS, "total_sequence_length", SIZE]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", WORDS])]
    angles = np.outer(np.arange(LONGEST), 10000 ** (-np.arange(SIZE // 2) * 2 / SIZE))
    w.constant("cos_cache", np.cos(angles).astype(np.float32))
    w.constant("sin_cache", np.sin(angles).astype(np.float32))
    w.node("ReduceSum", ["attention_mask", w.constant("last_axis", np.array([1]))], "counts", keepdims=0)
    w.node("Sub", ["counts", w.constant("one", np.array(1))], "last")
    w.node("Cast", ["last"], "seqlens_k", to=TensorProto.INT32)
    w.node("Shape", ["attention_mask"], "mask_shape")
    w.node("Gather", ["mask_shape", "one"], "length", axis=0)
    w.node("Cast", ["length"], "total_length", to=TensorProto.INT32)
    stream = w.node("Gather", [w.weight("embed_tokens.weight", WORDS, WIDTH), "input_ids"], "embedded")
    scale = w.constant("norm.0", np.ones(WIDTH, np.float32))
    now = w.node("SimplifiedLayerNormalization", [stream, scale], "normed", axis=-1, epsilon=1e-5, stash_type=1)
    for layer in range(layers):
        at = f"layers.{layer}"
        for part, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            w.node("MatMul", [now, w.weight(f"{at}.{part}_proj.weight", WIDTH, heads * SIZE)], f"{at}.{part}")
        kept = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        given = [f"{at}.q", f"{at}.k", f"{at}.v", *kept, "seqlens_k", "total_length", "cos_cache", "sin_cache"]
        made = [f"{at}.attended", f"present.{layer}.key", f"present.{layer}.value"]
        w.node("GroupQueryAttention", given, *made, domain=MS, num_heads=HEADS, kv_num_heads=GROUPS, do_rotary=1)
        w.node("MatMul", [made[0], w.weight(f"{at}.o_proj.weight", HEADS * SIZE, WIDTH)], f"{at}.o")
        scale = w.constant(f"norm.{2 * layer + 1}", np.ones(WIDTH, np.float32))
        skip = [f"{at}.between", "", "", f"{at}.stream"]
        w.node("SkipSimplifiedLayerNormalization", [stream, f"{at}.o", scale], *skip, domain=MS, epsilon=1e-5)
        for part in ("gate", "up"):
            w.node("MatMul", [skip[0], w.weight(f"{at}.{part}_proj.weight", WIDTH, HIDDEN)], f"{at}.{part}")
        w.node("Sigmoid", [f"{at}.gate"], f"{at}.open")
        w.node("Mul", [f"{at}.gate", f"{at}.open"], f"{at}.silu")
        w.node("Mul", [f"{at}.silu", f"{at}.up"], f"{at}.hidden")
        w.node("MatMul", [f"{at}.hidden", w.weight(f"{at}.down_proj.weight", HIDDEN, WIDTH)], f"{at}.down")
        scale = w.constant(f"norm.{2 * layer + 2}", np.ones(WIDTH, np.float32))
        after = [f"{at}.after"] + ([] if layer == layers - 1 else ["", "", f"{at}.out"])
        w.node("SkipSimplifiedLayerNormalization", [skip[3], f"{at}.down", scale], *after, domain=MS, epsilon=1e-5)
        stream, now = f"{at}.out", after[0]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, past) for name in kept]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, total) for name in made[1:]]
    w.node("MatMul", [now, w.weight("lm_head.weight", WIDTH, WORDS)], "logits")
    graph = helper.make_graph(w.nodes, "main_graph", inputs, outputs, w.tensors)
    imports = [helper.make_opsetid("", 14), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def texts(count: int = 64, steps: int = 12, seed: int = 1) -> dict[str, np.ndarray]:
    """Words that follow from the two before them; rows of different lengths, padded with their mask."""
    generator = np.random.default_rng(seed)
    ids = np.zeros((count, steps), np.int64)
    ids[:, :2] = generator.integers(0, WORDS, (count, 2))
    for at in range(2, steps):
        ids[:, at] = (ids[:, at - 1] + 2 * ids[:, at - 2]) % WORDS
    lengths = generator.integers(4, steps + 1, count)
    return {"input_ids": ids, "attention_mask": (np.arange(steps) < lengths[:, None]).astype(np.int64)}
