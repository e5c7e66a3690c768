"""How the rule tests describe one node: its operator, inputs, attributes and constants."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import helper

from tests.autodiff.checking import Errors, check, model_of


def floats(*shape: int, low: float = -2, high: float = 2, seed: int = 0) -> np.ndarray:
    """Uniform float32, the same for one shape and seed."""
    key = zlib.crc32(repr((shape, low, high, seed)).encode())
    return np.random.default_rng(key).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    """int64 [n]."""
    return np.array(values, np.int64)


@dataclasses.dataclass
class Case:
    """One node. `feeds`: inputs that get gradients where they are floats. `constants`: initializers, after the feeds.

    `nodes`: several in its place, as onnx.parser reads them, which make y of the feeds; `op` then names the case.
    `inputs`: names in the node's order where that differs; "" leaves one out. `wrt`, `missing`, `defined`: see `check`.
    """

    op: str
    feeds: Mapping[str, Any]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Sequence[str] | None = None
    outputs: Sequence[str] = ("y",)
    nodes: Sequence[str] = ()
    opset: int = 18
    domain: str = ""
    wrt: Sequence[str] | None = None
    missing: Sequence[str] = ()
    defined: bool = False
    run: bool = True
    dynamic: bool = True  # whether it also works with all dimensions free
    exact: float = 1e-6
    runtime: float = 1e-5

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, array.shape)) or "scalar" for array in self.feeds.values())
        settings = "-".join(f"{name}={value}" for name, value in self.attributes.items())
        return "-".join(x for x in (self.op, shapes, settings, f"opset{self.opset}") if x).replace(" ", "")

    def model(self, dynamic: bool = False) -> onnx.ModelProto:
        """The node as a model."""
        names = self.inputs if self.inputs is not None else [*self.feeds, *self.constants]
        nodes = [onnx.parser.parse_node(text) for text in self.nodes]
        if not nodes:
            nodes = [helper.make_node(self.op, names, list(self.outputs), domain=self.domain, **self.attributes)]
        constants = {name: np.asarray(array) for name, array in self.constants.items()}
        given = [name for name in self.outputs if name]
        return model_of(
            nodes, self.feeds, given, self.opset, constants, dynamic, {self.domain: 1} if self.domain else {}
        )

    def check(self, dynamic: bool = False) -> Errors:
        """Hold its gradients to finite differences and ONNX Runtime to them."""
        return check(
            self.model(dynamic),
            self.feeds,
            wrt=self.wrt,
            missing=self.missing,
            defined=self.defined,
            run=self.run,
            exact=self.exact,
            runtime=self.runtime,
        )
