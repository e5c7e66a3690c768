"""What a model is, where its bytes are, and what each pass could touch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxcompress import registry
from onnxcompress.contract import Pass
from onnxcompress.encodings import functions
from onnxcompress.model import provenance
from onnxcompress.model.cost import costs, total_macs
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.shapes import shapes
from onnxcompress.model.sizes import saved_bytes
from onnxcompress.model.weights import Weight, weights

if TYPE_CHECKING:
    from onnxcompress.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output: name, element type and axes, as the model declares them."""

    name: str
    type: str
    shape: list[int | str | None] | None


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One weight: how it is stored and what it is for."""

    key: str
    role: str
    encoding: str
    dtype: str
    shape: list[int]
    bytes: int
    op: str


@dataclasses.dataclass(frozen=True)
class Reach:
    """What one pass, with its defaults, would try: how many weights, their bytes, and why it leaves how many others."""

    weights: int
    bytes: int
    left: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `bytes`: file and external data; `operators`: how many of each; `macs`: of one call, if
    known; `trainable`: where it was asked for.
    """

    bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: list[Port]
    outputs: list[Port]
    operators: dict[str, int]
    weights: list[WeightRow]
    macs: int | None
    touchable: dict[str, Reach]
    provenance: dict[str, Any] | None
    trainable: Trainable | None = None

    def by_role(self) -> dict[str, tuple[int, int]]:
        """role -> (number of weights, bytes), largest first."""
        found: dict[str, tuple[int, int]] = {}
        for row in self.weights:
            count, size = found.get(row.role, (0, 0))
            found[row.role] = (count + 1, size + row.bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": 1, **dataclasses.asdict(self)}


def inspect(model: Loadable, *, trainable: bool = False) -> Inspection:
    """Look into a model without changing or running it.

    `trainable`: look, too, which weights a training would reach. That differentiates the graph; a model of an opset
    before 13 is lifted for it, and run once to see that nothing changed.

    Raises:
        ModelError: it cannot be loaded.
    """
    loaded = load(model)
    source = source_of(loaded)
    found = provenance.read(loaded)
    nodes = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for root in [loaded.graph, *(f.graph for f in loaded.functions.values() if f.domain != functions.DOMAIN)]
        for node in ir.traversal.RecursiveGraphIterator(root)
    )
    held = weights(loaded)
    return Inspection(
        bytes=source.bytes if source is not None else saved_bytes(loaded),
        ir_version=loaded.ir_version,
        opsets=dict(loaded.opset_imports),
        producer=" ".join(filter(None, (loaded.producer_name, loaded.producer_version))),
        inputs=[_port(value) for value in loaded.graph.inputs if not value.is_initializer()],
        outputs=[_port(value) for value in loaded.graph.outputs],
        operators=dict(sorted(nodes.items(), key=lambda item: (-item[1], item[0]))),
        weights=[_row(weight) for weight in held],
        macs=_macs(loaded),
        touchable=_touchable(held),
        provenance=dataclasses.asdict(found) if found is not None else None,
        trainable=_trainable(loaded) if trainable else None,
    )


def _trainable(model: ir.Model) -> Trainable:
    from onnxcompress.trainable import trainable  # the rules of all operators: a second of imports

    return trainable(model)


def _touchable(held: list[Weight]) -> dict[str, Reach]:
    """What every installed pass that says so would try."""
    found = {}
    for name in registry.names():
        kind = registry.load(name)
        if kind.refuses is Pass.refuses:
            continue
        refusals = [(weight, kind().refuses(weight)) for weight in held]
        tried = [weight for weight, refused in refusals if refused is None]
        left = Counter(refused[0].value for _, refused in refusals if refused is not None)
        found[name] = Reach(len(tried), sum(weight.nbytes for weight in tried), dict(left.most_common()))
    return found


def _port(value: ir.Value) -> Port:
    kind = str(value.type) if value.type is not None else "?"
    if value.shape is None:
        return Port(value.name or "", kind, None)
    return Port(value.name or "", kind, [d if isinstance(d, int) else d.value for d in value.shape])


def _row(weight: Weight) -> WeightRow:
    ops = sorted({use.op_type for use in weight.uses})
    return WeightRow(
        weight.key,
        weight.role,
        weight.encoding.kind,
        str(weight.dtype),
        [int(d) for d in weight.shape],
        weight.nbytes,
        ", ".join(ops) or "nothing",
    )


def _macs(model: ir.Model) -> int | None:
    found = costs(model, shapes(model))
    return total_macs(found) if any(c.macs is not None for c in found) else None
