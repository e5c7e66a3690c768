"""A recurrent network that reads a digit row by row, as a scanner would: bidirectional GRU, GRU, heads inside an If.

Data: `sklearn.datasets.load_digits` (test part of UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0; shipped by scikit-learn, BSD-3-Clause). Metric: top-1 accuracy on 700 held-out images, all
8 rows given. Input `rows` float32 [batch, steps, 8], pixels 0..16. Output `logits` float32 [batch, 10].
The graph looks at `steps`: a whole image (8 rows or more) goes to the head trained on whole images, a part of one to
the head trained on the first 4 to 7 rows. Each head's weights live inside its branch of the If.
Run: `python -m models.digits_gru.make` (a minute).
"""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from models import common

HERE = pathlib.Path(__file__).parent
EPOCHS, BATCH, HIDDEN = 80, 64, 64


class Net(nn.ModuleDict):
    """Bidirectional GRU, GRU, mean over the steps, and one of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self["both"] = nn.GRU(8, HIDDEN, batch_first=True, bidirectional=True)
        self["forth"] = nn.GRU(2 * HIDDEN, HIDDEN, batch_first=True)
        for head in ("whole", "part"):
            self[head] = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        features = self["forth"](self["both"](rows / 16)[0])[0].mean(1)
        return self["whole" if rows.shape[1] >= 8 else "part"](features)


def train(images: torch.Tensor, labels: torch.Tensor) -> Net:
    """AdamW, one-cycle rate, label smoothing, shifts by up to one pixel; each batch once whole and once cut off."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    each = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, EPOCHS * each)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for pick in order[: each * BATCH].split(BATCH):
            dy, dx = torch.randint(0, 3, (2,)).tolist()
            x = F.pad(images[pick], (1, 1, 1, 1))[:, dy : dy + 8, dx : dx + 8]
            cut = int(torch.randint(4, 8, ()))
            loss = sum(F.cross_entropy(net(rows), labels[pick], label_smoothing=0.1) for rows in (x, x[:, :cut]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net


def gru(name: str, layer: nn.GRU) -> list[onnx.TensorProto]:
    """W, R and B of ONNX's GRU: torch's gates are reset, update, new; ONNX's are update, reset, new."""
    state = {key: value.numpy() for key, value in layer.state_dict().items()}
    ends = ["_l0", "_l0_reverse"] if layer.bidirectional else ["_l0"]

    def stacked(kind: str) -> np.ndarray:
        gates = [np.split(state[kind + end], 3) for end in ends]
        return np.stack([np.concatenate([update, reset, new]) for reset, update, new in gates])

    bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
    arrays = {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "B": bias}
    return [numpy_helper.from_array(array, f"{name}.{key}") for key, array in arrays.items()]


def branch(name: str, layers: nn.Module) -> onnx.GraphProto:
    """One branch of the If: `features` of the outer graph -> Gemm, Relu, Gemm with this branch's own weights."""
    weights = [numpy_helper.from_array(value.numpy(), f"{name}.{key}") for key, value in layers.state_dict().items()]
    nodes = [
        node("Gemm", ["features", f"{name}.0.weight", f"{name}.0.bias"], f"{name}.hidden", transB=1),
        node("Relu", [f"{name}.hidden"], f"{name}.relu"),
        node("Gemm", [f"{name}.relu", f"{name}.2.weight", f"{name}.2.bias"], f"{name}.logits", transB=1),
    ]
    output = helper.make_tensor_value_info(f"{name}.logits", onnx.TensorProto.FLOAT, ["batch", 10])
    return helper.make_graph(nodes, name, [], [output], weights)


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    """A node named as its output."""
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def to_onnx(net: Net) -> onnx.ModelProto:
    """The graph, written by hand: torch's exporter knows neither the If nor a tidy GRU."""
    integers = {"time": [0], "direction": [1], "joined": [0, 0, 2 * HIDDEN], "whole_steps": [8]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), key) for key, value in integers.items()]
    constants.append(numpy_helper.from_array(np.array(16, np.float32), "white"))
    common_gru = {"hidden_size": HIDDEN, "linear_before_reset": 1}  # torch resets behind the recurrent product
    branches = {"then_branch": branch("whole", net["whole"]), "else_branch": branch("part", net["part"])}
    nodes = [
        node("Div", ["rows", "white"], "scaled"),
        node("Transpose", ["scaled"], "time_first", perm=[1, 0, 2]),
        node("GRU", ["time_first", "both.W", "both.R", "both.B"], "both", direction="bidirectional", **common_gru),
        node("Transpose", ["both"], "batch_before_direction", perm=[0, 2, 1, 3]),
        node("Reshape", ["batch_before_direction", "joined"], "both_joined"),
        node("GRU", ["both_joined", "forth.W", "forth.R", "forth.B"], "forth", **common_gru),
        node("Squeeze", ["forth", "direction"], "states"),
        node("ReduceMean", ["states", "time"], "features", keepdims=0),
        node("Shape", ["rows"], "steps", start=1, end=2),
        node("GreaterOrEqual", ["steps", "whole_steps"], "is_whole"),
        node("If", ["is_whole"], "logits", **branches),
    ]
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["batch", "steps", 8])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 10])
    weights = [*gru("both", net["both"]), *gru("forth", net["forth"])]
    graph = helper.make_graph(nodes, "digits_gru", [rows], [logits], [*weights, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", common.OPSET)], ir_version=10)


def main() -> None:
    common.seed(0)
    data = {name: {"rows": x, "y": y} for name, (x, y) in common.digits_split().items()}
    for name, arrays in data.items():
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
    net = train(torch.from_numpy(data["train"]["rows"]).float(), torch.from_numpy(data["train"]["y"]).long())
    common.save(to_onnx(net), HERE / "model.onnx")
    parts = {"rows": data["eval"]["rows"][:, :5], "y": data["eval"]["y"]}
    common.card(
        HERE,
        data["eval"],
        licence="scikit-learn digits (UCI optdigits), CC BY 4.0",
        score_first_5_rows=common.score(HERE / "model.onnx", parts),
    )


if __name__ == "__main__":
    main()
