"""A model as the rules look at it: what is constant, what is quantized, what each node is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions, recognize
from onnxcompress.linting.finding import Finding, Level
from onnxcompress.model import bridge
from onnxcompress.targets import Target

ONNX = ("", "ai.onnx")
LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


@dataclasses.dataclass(frozen=True)
class Site:
    """A node and the path of its scope."""

    path: str
    node: ir.Node

    @property
    def name(self) -> str:
        """Name of the node; that of its first output where it has none."""
        outputs = self.node.outputs
        return self.path + (self.node.name or (outputs[0].name if outputs else None) or "")

    @property
    def operator(self) -> str:
        """Operator, with its domain unless it is ONNX's own."""
        return f"{self.node.domain}::{self.node.op_type}" if self.node.domain not in ONNX else self.node.op_type

    def finding(self, rule: str, level: Level, message: str, mend: str) -> Finding:
        """A finding about this node."""
        return Finding(rule, level, self.name, self.operator, message, mend)


class View:
    """`nodes`: those that run; `folded`: those that depend on constants alone, which a runtime computes at load."""

    def __init__(self, model: ir.Model, target: Target) -> None:
        self.model = model
        self.target = target
        self._static: dict[int, bool] = {}
        self.nodes: list[Site] = []
        self.folded: list[Site] = []
        for path, owner in bridge.scopes(model):
            if isinstance(owner, ir.Function) and owner.domain == functions.DOMAIN:
                continue
            for node in owner:
                site = Site(path, node)
                (self.folded if self._computed_at_load(node) else self.nodes).append(site)

    @property
    def level(self) -> Level:
        """How much it weighs that the target does not take something."""
        return "error" if self.target.strict else "warning"

    def static(self, value: ir.Value | None) -> bool:
        """True for what depends on constants alone."""
        if value is None or recognize.constant(value) is not None:
            return True
        node = value.producer()
        return node is not None and self._computed_at_load(node)

    def _computed_at_load(self, node: ir.Node) -> bool:
        if id(node) not in self._static:
            subgraphs = any(attribute.type in _GRAPHS for attribute in node.attributes.values())
            self._static[id(node)] = False  # a cycle is no constant
            self._static[id(node)] = (
                not subgraphs
                and not node.op_type.startswith("Random")
                and (bool(node.inputs) or node.op_type == "Constant")
                and all(self.static(value) for value in node.inputs)
            )
        return self._static[id(node)]

    def quantizers(self) -> Iterator[Site]:
        """Every QuantizeLinear and DequantizeLinear, of activations and of weights."""
        for site in (*self.nodes, *self.folded):
            if site.node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield site

    def layers(self) -> Iterator[Site]:
        """Every Conv, ConvTranspose, MatMul and Gemm that runs."""
        for site in self.nodes:
            if site.node.op_type in LAYERS and site.node.domain in ONNX:
                yield site


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def array(node: ir.Node, index: int) -> np.ndarray | None:
    """The constant at input `index` of a node."""
    tensor = recognize.constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if tensor is None else tensor.numpy()


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or what it is when not given."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def element(node: ir.Node) -> str:
    """The element type on the quantized side of a QuantizeLinear or DequantizeLinear, in numpy's words."""
    if node.op_type == "DequantizeLinear":
        value = node.inputs[0]
        tensor = recognize.constant(value)
        dtype = tensor.dtype if tensor is not None else value.dtype if value is not None else None
        if dtype is None and value is not None and value.producer() is not None:
            made = value.producer()
            return element(made) if made is not None and made.op_type == "QuantizeLinear" else ""
        if dtype is not None:
            return str(dtype.numpy().name)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        tensor = recognize.constant(zero)
        dtype = tensor.dtype if tensor is not None else zero.dtype
        return str(dtype.numpy().name) if dtype is not None else ""
    stated = integer(node, "output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
    return str(ir.DataType(stated).numpy().name) if stated else "uint8"


def bits(name: str) -> int:
    """Bits of an element type: 4 for int4; 0 where unknown."""
    digits = "".join(c for c in name.split("_")[0] if c.isdigit())
    return int(digits) if digits else 0
