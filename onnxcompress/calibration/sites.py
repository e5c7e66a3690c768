"""A copy of a model in which more can be computed from any of its values and seen from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.model import bridge
from onnxcompress.model.shapes import values
from onnxcompress.model.taps import tap


class Sites:
    """A copy of `model`. Values are called by their names with the path of their scope (`bridge.scopes`)."""

    def __init__(self, model: ir.Model) -> None:
        self.model = bridge.clone(model)
        self._sites: dict[str, tuple[str, ir.Graph | ir.Function, ir.Value]] = {}
        for path, owner in bridge.scopes(self.model):
            for value in values(owner):
                if value.name:
                    self._sites.setdefault(f"{path}{value.name}", (path, owner, value))
        self._count = 0

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def value(self, name: str) -> ir.Value:
        """The copy's value of that name."""
        return self._sites[name][2]

    def add(
        self,
        at: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        scalar: bool = False,
    ) -> ir.Value:
        """A node at the end of the scope of value `at`."""
        path, owner, _ = self._sites[at]
        output = ir.Value(name=self._fresh(path, at), type=ir.TensorType(dtype), shape=ir.Shape([]) if scalar else None)
        made = ir.convenience.convert_attributes(dict(attributes or {}))
        owner.append(ir.Node("", op_type, inputs, attributes=made, outputs=[output], name=f"{output.name}/node"))
        self._sites[f"{path}{output.name}"] = path, owner, output
        return output

    def constant(self, at: str, array: np.ndarray) -> ir.Value:
        """A constant in the scope of value `at`."""
        return self.add(at, "Constant", [], {"value": ir.tensor(array)}, dtype=ir.DataType.from_numpy(array.dtype))

    def name(self, at: str, value: ir.Value) -> str:
        """The name, with the path of its scope, of what `add` made at `at`."""
        return f"{self._sites[at][0]}{value.name}"

    def seen(self, names: Iterable[str]) -> tuple[ir.Model, dict[str, str], dict[str, str]]:
        """The copy with `names` as outputs: model, name -> output, name -> output that says whether it was computed.

        Names that cannot be seen from outside are left out.
        """
        tapped = tap(self.model, list(names))
        return tapped.model, tapped.outputs, tapped.valid

    def _fresh(self, path: str, at: str) -> str:
        self._count += 1
        return f"{at[len(path) :]}/site{self._count}"
