"""Where the integers of a model lie, and how what was learned about them is stored there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.encodings.affine import Affine
from onnxcompress.errors import PassError
from onnxcompress.numerics.error import relative_rms


@dataclasses.dataclass(frozen=True)
class Place:
    """A weight that an operator takes as integers.

    `encoding`: what it stands for, as it trains. `q`, `scale`: names of the constants that hold it, of the main graph.
    `pack`: integers of the encoding to an array as `q` stores it. `factor`: of a bias, the integers of the weight
    whose scale times this number (the scale of the activation) is its own; `scale` is "" then.
    """

    key: str
    q: str
    scale: str
    encoding: Affine
    pack: Callable[[np.ndarray], np.ndarray] = lambda integers: integers
    factor: tuple[str, float] | None = None


class Places(Mapping[str, Place]):
    """The places of one model by the keys of their weights."""

    def __init__(self, model: ir.Model, found: Mapping[str, Place]) -> None:
        self._model, self._found = model, dict(found)

    def __getitem__(self, key: str) -> Place:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def of(self, model: ir.Model) -> Places:
        """The same places in another copy of the model."""
        return Places(model, self._found)

    def store(self, trained: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Put what was learned about weights in these places into the model; the relative change of each.

        A bias is counted in steps of its weight's scale, so it is rounded anew where that was learned.
        """
        errors: dict[str, float] = {}
        learned = [p for p in self._found.values() if "scale" in trained.get(p.key, {}) and self._owns_scale(p)]
        scales = {place.q: trained[place.key]["scale"] for place in learned}
        for place in self._found.values():
            parts, encoding = dict(trained.get(place.key, {})), place.encoding
            if place.factor is not None and place.factor[0] in scales:
                scale = scales[place.factor[0]] * np.float32(place.factor[1])
                parts = {"w": encoding.decode(), **parts, "scale": scale.reshape(encoding.scale.shape)}
            elif place.q not in scales:
                parts.pop("scale", None)
            if not parts:
                continue
            new = encoding.updated(parts)
            self._put(place.q, place.pack(new.q), new.notes())
            if "scale" in parts and place.scale:
                self._put(place.scale, new.scale)
            errors[place.key] = relative_rms(encoding.decode(), new.decode())
        return errors

    def _owns_scale(self, place: Place) -> bool:
        """False where others take the constant that holds its scale: it keeps its value, whatever was learned."""
        if any(other.scale == place.scale for other in self._found.values() if other is not place):
            return False
        held = named(self._model.graph)
        takers, scaled = ({id(node) for node, _ in held[name].uses()} for name in (place.q, place.scale))
        return not takers & scaled or scaled <= takers

    def _put(self, name: str, array: np.ndarray, notes: Mapping[str, str] | None = None) -> None:
        """Store `array` in the constant `name`, in its shape and type. `notes`: for its metadata."""
        value = named(self._model.graph).get(name)
        held = recognize.constant(value)
        if value is None or held is None:
            raise PassError(f"the constant {name!r} was lost in training (a bug)")
        array = np.ascontiguousarray(array).reshape(held.shape.numpy()).astype(held.dtype.numpy(), copy=False)
        tensor = ir.tensor(array, dtype=held.dtype, name=held.name)
        tensor.metadata_props.update(notes or {})
        node = value.producer()
        if node is None:
            value.const_value = tensor
        else:
            for attribute in [a for a in node.attributes if a.startswith("value")]:
                del node.attributes[attribute]
            node.attributes["value"] = ir.AttrTensor("value", tensor)


def named(graph: ir.Graph) -> dict[str, ir.Value]:
    """The constants of a graph by name."""
    found = {str(value.name): value for value in graph.initializers.values()}
    for node in graph:
        if node.op_type == "Constant" and not node.domain:
            found[str(node.outputs[0].name)] = node.outputs[0]
    return found
