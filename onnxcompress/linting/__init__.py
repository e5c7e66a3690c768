"""What a deployment target would refuse, run slowly or compute differently, read off the graph without running it."""

from __future__ import annotations

from onnxcompress.linting.finding import Finding, Linted
from onnxcompress.linting.linter import lint

__all__ = ["Finding", "Linted", "lint"]
