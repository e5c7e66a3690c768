"""The table of differentiable operators in the documentation, made from what the rules say of themselves.

`python -m onnxcompress.autodiff > docs/operators.md` writes it again.
"""

from __future__ import annotations

import inspect

import onnxcompress.autodiff.definitions as _definitions  # noqa: F401  fills the table
import onnxcompress.autodiff.rules as _rules  # noqa: F401  fills the table
from onnxcompress.autodiff.definition import DEFINITIONS
from onnxcompress.autodiff.rule import FAMILIES, REFUSALS, RULES, STRAIGHT_THROUGH, ZERO

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

WITHOUT = (
    "ConvInteger and MatMulInteger, QLinearConv and QLinearMatMul (a training puts float products in their place)",
    "Det",
    "DFT and STFT",
    "DeformConv",
    "MaxRoiPool",
    "sequences and optionals",
    "BitCast",
    "Unique",
)
"""What has float inputs and no rule."""

_HEAD = """# Operators with a gradient

Made by `python -m onnxcompress.autodiff > docs/operators.md`; a test holds it to the code. Opsets 13 and later; convert
older models first. An operator that is not listed raises `NoGradient`, which names the node and the weights it cuts
off, and so does a form of an operator listed under "refused". In formulas g is the gradient of the output y, dx that of
the input x (of two inputs: da and db). Where several inputs are of different shapes, their gradients are summed over
the axes along which they were repeated. A rank that is unknown is refused where the formula needs one.
"""


def operators_table() -> str:
    """Markdown: a table of rules by family, then definitions, then operators without influence and without a rule."""
    families: dict[str, list[str]] = {}
    standard = [op for domain, op in sorted(RULES) if not domain]  # others stand for what a training fuses
    for op in standard:
        families.setdefault(FAMILIES["", op], []).append(op)
    parts = [_HEAD, f"{len(standard)} operators have a rule of their own.\n"]
    for family in sorted(families):
        parts.append(f"## {family.replace('_', ' ').capitalize()}\n")
        parts += ["| operator | gradient | refused |", "|---|---|---|"]
        parts += [f"| {op} | {_cell(summary(op))} | {_cell(REFUSALS['', op])} |" for op in families[family]]
        parts.append("")
    parts += ["## By definition\n", "Replaced by other operators before differentiation.\n"]
    parts += ["- ONNX Runtime's (`com.microsoft`): " + ", ".join(sorted(op for d, op in DEFINITIONS if d)) + "."]
    parts += ["- Standard, training form: " + ", ".join(sorted(op for d, op in DEFINITIONS if not d)) + "."]
    parts += ["- By their definition in the ONNX standard: " + ", ".join(BY_STANDARD) + ".", ""]
    parts += ["## Straight through\n", ", ".join(sorted(op for _, op in STRAIGHT_THROUGH)) + ".", ""]
    parts += ["## No gradient passes\n", ", ".join(sorted(op for _, op in ZERO)) + ".", ""]
    parts += ["## Without a rule\n", f"Refused altogether: {', '.join(WITHOUT)}.", ""]
    return "\n".join(parts)


def summary(op: str) -> str:
    """What the first paragraph of a standard operator's rule says."""
    return " ".join((inspect.getdoc(RULES["", op]) or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
