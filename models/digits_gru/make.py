"""A recurrent network that reads a digit row by row, as a scanner would: bidirectional GRU, GRU, heads inside an If.

Data: `sklearn.datasets.load_digits` (test part of UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0; shipped by scikit-learn, BSD-3-Clause). Metric: top-1 accuracy on 700 held-out images, all
8 rows given. Input `rows` float32 [batch, steps, 8], pixels 0..16. Output `logits` float32 [batch, 10].
The graph looks at `steps`: a whole image (8 rows or more) goes to the head trained on whole images, a part of one to
the head trained on the first 4 to 7 rows. Each head's weights live inside its branch of the If.
Run: `python -m models.digits_gru.make` (a minute or two).
"""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models import common
from models.common import Arrays, node
from onnxcompress.training.settings import Settings

HERE = pathlib.Path(__file__).parent
WHOLE, PARTS, HIDDEN, CLASSES = 8, (4, 5, 6, 7), 64, 10
# Chosen by 200 of the training images that were held out for that. An epoch is 9 shifts of every image.
SETTINGS = Settings(epochs=12, batch=64, lr=3e-3, weight_decay=0.05, warmup=0.2)
SMOOTHING = 0.1
SHAPES = {
    "both.W": (2, 3 * HIDDEN, 8),
    "both.R": (2, 3 * HIDDEN, HIDDEN),
    "both.B": (2, 6 * HIDDEN),
    "forth.W": (1, 3 * HIDDEN, 2 * HIDDEN),
    "forth.R": (1, 3 * HIDDEN, HIDDEN),
    "forth.B": (1, 6 * HIDDEN),
}
HEAD_SHAPES = {
    "0.weight": (HIDDEN, HIDDEN),
    "0.bias": (HIDDEN,),
    "2.weight": (CLASSES, HIDDEN),
    "2.bias": (CLASSES,),
}


def reader(rows: str, end: str = "") -> list[onnx.NodeProto]:
    """Bidirectional GRU, GRU, mean over the steps: `rows` [steps, batch, 8] -> `features` [batch, hidden].

    `end` is put behind every name, so that one graph may hold it several times with the same weights.
    """
    gru = {"hidden_size": HIDDEN, "linear_before_reset": 1}  # resets behind the recurrent product
    return [
        node("GRU", [rows, "both.W", "both.R", "both.B"], f"both{end}", direction="bidirectional", **gru),
        node("Transpose", [f"both{end}"], f"batch_before_direction{end}", perm=[0, 2, 1, 3]),
        node("Reshape", [f"batch_before_direction{end}", "joined"], f"both_joined{end}"),
        node("GRU", [f"both_joined{end}", "forth.W", "forth.R", "forth.B"], f"forth{end}", **gru),
        node("Squeeze", [f"forth{end}", "direction"], f"states{end}"),
        node("ReduceMean", [f"states{end}", "time"], f"features{end}", keepdims=0),
    ]


def head(name: str, end: str = "") -> list[onnx.NodeProto]:
    """Gemm, Relu, Gemm with the weights of the head `name`: `features` -> its `logits`."""
    return [
        node("Gemm", [f"features{end}", f"{name}.0.weight", f"{name}.0.bias"], f"{name}.hidden{end}", transB=1),
        node("Relu", [f"{name}.hidden{end}"], f"{name}.relu{end}"),
        node("Gemm", [f"{name}.relu{end}", f"{name}.2.weight", f"{name}.2.bias"], f"{name}.logits{end}", transB=1),
    ]


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """The weights of the head `name`."""
    return {f"{name}.{key}": shape for key, shape in HEAD_SHAPES.items()}


def for_training() -> onnx.ModelProto:
    """One output `logits` [batch, 5, 10]: of the whole image, and of each of its parts, all by the same weights."""
    nodes, found = [], []
    for steps in (WHOLE, *PARTS):
        name, end = "whole" if steps == WHOLE else "part", f".{steps}"
        nodes += [
            node("Slice", ["time_first", "start", f"steps{end}", "time"], f"rows{end}"),
            *reader(f"rows{end}", end),
            *head(name, end),
            node("Unsqueeze", [f"{name}.logits{end}", "middle"], f"logits{end}"),
        ]
        found.append(f"logits{end}")
    nodes.append(node("Concat", found, "logits", axis=1))
    weights = common.undrawn(SHAPES | shapes_of("whole") | shapes_of("part"))
    constants = {"start": [0], "middle": [1], **{f"steps.{steps}": [steps] for steps in (WHOLE, *PARTS)}}
    return model(nodes, weights, constants, [1 + len(PARTS), CLASSES])


def to_onnx(arrays: Arrays) -> onnx.ModelProto:
    """The network for use, with the weights in `arrays`."""
    branches = {"then_branch": branch("whole", arrays), "else_branch": branch("part", arrays)}
    nodes = [
        *reader("time_first"),
        node("Shape", ["rows"], "steps", start=1, end=2),
        node("GreaterOrEqual", ["steps", "whole_steps"], "is_whole"),
        node("If", ["is_whole"], "logits", **branches),
    ]
    return model(nodes, {name: arrays[name] for name in SHAPES}, {"whole_steps": [WHOLE]}, [CLASSES])


def branch(name: str, arrays: Arrays) -> onnx.GraphProto:
    """One branch of the If: `features` of the outer graph go through a head with this branch's own weights."""
    weights = [numpy_helper.from_array(arrays[key], key) for key in shapes_of(name)]
    output = helper.make_tensor_value_info(f"{name}.logits", onnx.TensorProto.FLOAT, ["batch", CLASSES])
    return helper.make_graph(head(name), name, [], [output], weights)


def model(
    nodes: list[onnx.NodeProto], weights: Arrays, constants: dict[str, list[int]], output: list[int]
) -> onnx.ModelProto:
    """`nodes` behind the scaling of `rows`; the output `logits` is [batch, *output]."""
    constants = {"time": [0], "direction": [1], "joined": [0, 0, 2 * HIDDEN], **constants}
    held = weights | {name: np.array(value, np.int64) for name, value in constants.items()}
    held["white"] = np.array(16, np.float32)
    first = [node("Div", ["rows", "white"], "scaled"), node("Transpose", ["scaled"], "time_first", perm=[1, 0, 2])]
    rows = ("rows", onnx.TensorProto.FLOAT, ["batch", "steps", 8])
    return common.model("digits_gru", [*first, *nodes], [rows], ["batch", *output], held)


def main() -> None:
    data = common.digits(HERE, "rows", (8, 8))
    rows, labels = common.shifted(data["train"]["rows"]), np.tile(data["train"]["y"], 9)
    every = np.repeat(labels[:, None], 1 + len(PARTS), axis=1)
    arrays = common.train(for_training(), {"rows": rows, "y": every}, SETTINGS, SMOOTHING)
    common.save(to_onnx(arrays), HERE / "model.onnx")
    parts = {"rows": data["eval"]["rows"][:, :5], "y": data["eval"]["y"]}
    common.card(
        HERE,
        data["eval"],
        licence="scikit-learn digits (UCI optdigits), CC BY 4.0",
        score_first_5_rows=common.score(HERE / "model.onnx", parts),
    )


if __name__ == "__main__":
    main()
