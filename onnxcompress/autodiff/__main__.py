"""Print the table of differentiable operators."""

from __future__ import annotations

from onnxcompress.autodiff.table import operators_table

print(operators_table(), end="")
