"""Nodes, shares of the multiply-accumulates and executed kernels by provider, and what is said of them."""

from __future__ import annotations

import json
import pathlib

from onnxcompress.model.cost import NodeCost
from onnxcompress.validation.placement import (
    FellBack,
    Node,
    ProviderRow,
    counted,
    executed,
    fallen,
    judge_row,
    macs_shares,
    took_none,
)
from onnxcompress.validation.verdict import Verdict

COSTS = [
    NodeCost("conv", "Conv", "", 600, 0),
    NodeCost("fc", "MatMul", "", 300, 0),
    NodeCost("if/then/inner", "MatMul", "", 60, 0),
    NodeCost("gru", "GRU", "", 40, 0),
    NodeCost("relu", "Relu", "", 0, 0),
]


def test_shares_by_name_by_longer_name_and_by_operator() -> None:
    nodes = [
        Node("conv", "Conv", "cuda"),
        Node("fc/MatMulAddFusion", "Gemm", "cpu"),
        Node("inner", "MatMul", "cuda"),
        Node("", "GRU", "cpu"),
        Node("relu", "Relu", "cuda"),
    ]
    assert counted(nodes) == {"cuda": 3, "cpu": 2}
    assert macs_shares(nodes, COSTS) == {"cpu": 0.34, "cuda": 0.66}


def test_shares_that_cannot_be_known() -> None:
    nodes = [Node("a", "GRU", "cpu"), Node("b", "GRU", "cuda"), Node("conv", "Conv", "cuda")]
    assert macs_shares(nodes, COSTS) == {"cpu": 0.0, "cuda": 0.6}
    assert macs_shares(nodes, [COSTS[-1]]) is None
    assert macs_shares([], COSTS) is None
    assert macs_shares([Node("x", "Fused", "cuda")], COSTS) == {"cuda": 1.0}


def test_kernels_of_a_profile(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "profile.json"
    rows = [("a_kernel_time", "CUDAExecutionProvider"), ("b_kernel_time", "CPUExecutionProvider")]
    rows += [("c_kernel_time", "CUDAExecutionProvider"), ("c_fence_before", "CPUExecutionProvider")]
    events = [{"cat": "Node", "name": name, "args": {"provider": provider}} for name, provider in rows]
    path.write_text(json.dumps([{"cat": "Session", "name": "model_run", "args": {}}, *events]))
    assert executed(path) == {"cuda": 2, "cpu": 1}
    path.write_text("[")
    assert executed(path) is None
    assert executed(tmp_path / "none.json") is None


def test_what_was_not_taken_and_why() -> None:
    nodes = [Node(f"q{i}", "QLinearConv", "cpu") for i in range(5)]
    nodes += [Node("s", "Shape", "cpu"), Node("t", "Foo", "cpu"), Node("c", "Conv", "cuda")]
    found = fallen("cuda", nodes)
    assert [(entry.op_type, len(entry.nodes), entry.reason) for entry in found] == [
        ("QLinearConv", 5, "cuda has no such operator"),
        ("Shape", 1, "ONNX Runtime keeps shapes on the CPU"),
        ("Foo", 1, None),
    ]
    assert str(found[0]) == "QLinearConv x 5 on cpu (q0, q1, q2 and 2 more: cuda has no such operator)"
    assert str(found[2]) == "Foo x 1 on cpu (t)"
    said = took_none("qnn", nodes[-1:], free=["image"])
    assert said == (
        "took no node of this model (CUDAExecutionProvider: 1): qnn takes fixed shapes alone, and input 'image' has a "
        "free dimension"
    )
    assert took_none("cuda", None).startswith("this onnxruntime does not tell")
    assert took_none("cuda", []) == "took no node of this model (there are none)"


def test_a_small_share_is_told_and_none_fails() -> None:
    left = (FellBack("MatMul", ("fc",), "cpu"),)
    common = {"provider": "cuda:device_id=0", "ran": True, "nodes": {"cuda": 3, "cpu": 1}, "fell_back": left}
    much = judge_row(ProviderRow(**common, macs={"cuda": 0.95, "cpu": 0.05}))  # type: ignore[arg-type]
    assert (much.verdict, much.reasons) == (Verdict.PASS, ())
    some = judge_row(ProviderRow(**common, macs={"cuda": 0.2, "cpu": 0.8}))  # type: ignore[arg-type]
    assert some.verdict is Verdict.PASS
    assert some.reasons == (
        "provider cuda:device_id=0 ran 20.0% of the multiply-accumulates (3 of 4 nodes); "
        "not taken: MatMul x 1 on cpu (fc)",
    )
    none = judge_row(ProviderRow(**common, macs={"cuda": 0.0, "cpu": 1.0}))  # type: ignore[arg-type]
    assert none.verdict is Verdict.FAIL
    assert "ran 3 of 4 nodes and none of the multiply-accumulates" in none.reasons[0]
    failed = judge_row(ProviderRow("cuda", False, "no driver"))
    assert (failed.verdict, failed.reasons) == (Verdict.FAIL, ("provider cuda did not run: no driver",))
