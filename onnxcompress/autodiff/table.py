"""The table of differentiable operators in the documentation, made from the rules themselves.

`python -m onnxcompress.autodiff > docs/operators.md` writes it again.
"""

from __future__ import annotations

import inspect
import re

import onnxcompress.autodiff.definitions as _definitions  # noqa: F401  fills the table
import onnxcompress.autodiff.rules as _rules  # noqa: F401  fills the table
from onnxcompress.autodiff.definition import DEFINITIONS
from onnxcompress.autodiff.rule import FAMILIES, PARTIALS, RULES, STRAIGHT_THROUGH, ZERO, Rule

BY_STANDARD = (
    "AffineGrid",
    "Attention",
    "CausalConvWithState",
    "CenterCropPad",
    "GroupNormalization",
    "MeanVarianceNormalization",
    "NegativeLogLikelihoodLoss",
    "RotaryEmbedding",
    "SoftmaxCrossEntropyLoss",
    "SwiGLU",
)
"""Operators checked to work through their definition in the ONNX standard; others that have one may work as well."""

_HEAD = """# Operators with a gradient

Made by `python -m onnxcompress.autodiff > docs/operators.md`; a test holds it to the code. Opsets 13 and later; convert
older models first. An operator that is not listed raises `NoGradient`, which names the node and the weights it cuts
off, and so does a form of an operator listed under "refused". In formulas g is the gradient of the output y.
"""


def operators_table() -> str:
    """Markdown: a table of rules by family, then definitions, then operators without influence."""
    families: dict[str, list[tuple[str, str]]] = {}
    standard = [key for key in sorted(RULES) if not key[0]]  # others stand for what a training fuses
    for key in standard:
        families.setdefault(FAMILIES[key], []).append(key)
    parts = [_HEAD, f"{len(standard)} operators have a rule of their own.\n"]
    for family in sorted(families):
        parts.append(f"## {family.replace('_', ' ').capitalize()}\n")
        parts += ["| operator | gradient | refused |", "|---|---|---|"]
        parts += [f"| {key[1]} | {_summary(key)} | {_refusals(key)} |" for key in families[family]]
        parts.append("")
    parts += ["## By definition\n", "Replaced by other operators before differentiation.\n"]
    parts += ["- ONNX Runtime's (`com.microsoft`): " + ", ".join(sorted(op for d, op in DEFINITIONS if d)) + "."]
    parts += ["- Standard, training form: " + ", ".join(sorted(op for d, op in DEFINITIONS if not d)) + "."]
    parts += ["- By their definition in the ONNX standard: " + ", ".join(BY_STANDARD) + ".", ""]
    parts += ["## Straight through\n", ", ".join(sorted(op for _, op in STRAIGHT_THROUGH)) + ".", ""]
    parts += ["## No gradient passes\n", ", ".join(sorted(op for _, op in ZERO)) + ".", ""]
    return "\n".join(parts)


def _summary(key: tuple[str, str]) -> str:
    """The first line of the rule's docstring, or the formulas of an elementwise operator as they stand in the code."""
    if key in PARTIALS:
        source = " ".join(inspect.getsource(next(p for p in PARTIALS[key] if p)).split())
        return ", ".join(f"`{text}`" for text in re.findall(r"lambda [^:]*: (.*?)(?=, lambda|\)$)", source))
    text = inspect.getdoc(RULES[key])
    if text:
        return text.split("\n")[0].replace("|", "\\|")
    formula = re.search(r"return \[?(.*?)\]?\n?$", inspect.getsource(RULES[key]))
    return f"`{formula.group(1)}`" if formula else ""


def _refusals(key: tuple[str, str]) -> str:
    """What the rule and the helpers of its file say they refuse, read from their source."""
    seen: dict[str, None] = {}
    waiting: list[Rule] = [RULES[key]]
    done: set[Rule] = set()
    while waiting:
        function = waiting.pop()
        if function in done:
            continue
        done.add(function)
        source = inspect.getsource(function)
        seen.update(dict.fromkeys(re.findall(r'c\.refuse\(\s*f?"([^"]*)"', source)))
        module = inspect.getmodule(function)
        for name in re.findall(r"\b([a-z_]+)\(", source):
            helper = getattr(module, name, None)
            if inspect.isfunction(helper) and "Context" in str(inspect.signature(helper)):
                waiting.append(helper)
    return "; ".join(seen).replace("|", "\\|")
