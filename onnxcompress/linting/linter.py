"""Runs every rule over a model for one target."""

from __future__ import annotations

from onnxcompress.linting import integers, operators, quantized
from onnxcompress.linting.finding import Linted
from onnxcompress.linting.view import View
from onnxcompress.model.load import Loadable, load
from onnxcompress.targets import find

RULES = (*quantized.RULES, *integers.RULES, *operators.RULES)


def lint(model: Loadable, target: str) -> Linted:
    """Look for what `target` refuses, runs slowly or computes differently; nothing is run.

    Rules are the fields of the target's table (`onnxcompress.targets`), which the quantizer reads, too.

    Raises:
        ModelError: the model cannot be loaded.
        RecipeError: no such target.
    """
    view = View(load(model), find(target))
    found = [finding for rule in RULES for finding in rule(view)]
    found.sort(key=lambda finding: finding.level)  # errors first; the rest in the order of rules and graph
    return Linted(target, len(view.nodes) + len(view.folded), tuple(dict.fromkeys(found)))
