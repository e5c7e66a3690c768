"""Rules about operators: those a target lacks, runs elsewhere, or takes only in part."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from onnxcompress.encodings import functions
from onnxcompress.linting.finding import Finding, Level
from onnxcompress.linting.view import ONNX, Site, View, element
from onnxcompress.model import bridge

# What ONNX Runtime takes in ONNX's own domain though ONNX does not (any more).
_LEGACY = (
    "Affine", "Crop", "DynamicSlice", "ImageScaler", "ParametricSoftplus", "Scale", "ScaledTanh",
    "SimplifiedLayerNormalization",
)  # fmt: skip
_QUANTIZED = ("QLinear", "Integer", "DynamicQuantize", "QGemm", "QAttention")


def refused(view: View) -> Iterator[Finding]:
    """Operators that the target does not take, or whose domain it does not know."""
    target = view.target
    local = {(function.domain, function.name) for function in view.model.functions.values()}
    for site in view.nodes:
        op, domain = site.node.op_type, site.node.domain
        if op in target.refused and domain in (*ONNX, "com.microsoft"):
            mend = f"leave it out: onnxcompress quantize --mode static --target {target.name}"
            if not any(word in op for word in _QUANTIZED):
                mend = "express it by operators the target has"
            where = "does not take" if target.strict else "leaves to the CPU"
            yield site.finding("operator", view.level, f"is an operator that {target.name} {where}", mend)
        elif target.domains is not None and domain not in target.domains and (domain, op) not in local:
            yield site.finding(
                "domain", view.level, f"is an operator of {domain}, which {target.name} does not know",
                "export without it: onnxcompress writes ONNX's own operators",
            )  # fmt: skip
        for name, why in target.slow:
            if op == name or (op in ("QuantizeLinear", "DequantizeLinear") and element(site.node) == name):
                yield site.finding("slow", "warning", why, "use another form, or leave it in float")


def unknown(view: View) -> Iterator[Finding]:
    """Operators of ONNX's own domain that ONNX has in no version; TensorRT may have a plugin of that name."""
    local = {(function.domain, function.name) for function in view.model.functions.values()}
    level: Level = "warning" if view.target.name == "tensorrt" else "error"
    message = "is no operator of ONNX" + (": it needs a plugin of that name" if level == "warning" else "")
    for site in (*view.nodes, *view.folded):
        op, domain = site.node.op_type, site.node.domain
        if domain in ONNX and op not in _LEGACY and (domain, op) not in local and not onnx.defs.has(op, ""):
            yield site.finding("unknown-operator", level, message, "export it as operators of ONNX, or name its domain")


def limits(view: View) -> Iterator[Finding]:
    """Operators in a form that the target does not take."""
    by_operator = {limit.operator: limit for limit in view.target.limits}
    for site in view.nodes:
        limit = by_operator.get(site.node.op_type)
        if limit is None or site.node.domain not in ONNX:
            continue
        for index in limit.constant:
            value = site.node.inputs[index] if index < len(site.node.inputs) else None
            if not view.static(value):
                message = f"its input {index} ({value.name if value is not None else ''}) must be a constant"
                yield site.finding(
                    "operator-form", view.level, message, "fold it: onnxcompress compress --recipe lossless"
                )
        for name, taken in limit.attributes:
            if (found := _other(site, name, taken)) is not None:
                message = f"{name} is {found!r}; taken is {' or '.join(map(repr, taken))}"
                yield site.finding("operator-form", view.level, message, f"export it with {name} = {taken[0]!r}")
        used = [value for value in site.node.outputs[limit.outputs :] if value.name] if limit.outputs else []
        if any(value.uses() or value.is_graph_output() for value in used):
            yield site.finding(
                "operator-form", view.level, f"more than {limit.outputs} of its outputs are used", "use the first alone"
            )


def _other(site: Site, name: str, taken: tuple[object, ...]) -> object | None:
    """The attribute's value where it is not taken; None where it is, or is not given."""
    attribute = site.node.attributes.get(name)
    if attribute is None or attribute.is_ref():
        return None
    value = attribute.value
    parts = value if isinstance(value, list | tuple) else (value,)
    wrong = [part.decode() if isinstance(part, bytes) else part for part in parts]
    return next((part for part in wrong if part not in taken), None)


def opset(view: View) -> Iterator[Finding]:
    """An opset out of those the target's parser was written for."""
    bounds, found = view.target.opsets, view.model.opset_imports.get("", 1)
    if bounds is not None and not bounds[0] <= found <= bounds[1]:
        message = f"opset {found}; the parser of {view.target.name} was written for {bounds[0]} to {bounds[1]}"
        yield Finding("opset", "warning", "", "", message, "export the model in an opset between")


def sparse(view: View) -> Iterator[Finding]:
    """Sparse initializers and attributes: refused, or expanded at load."""
    for slot in bridge.slots(view.model):
        if bridge.SPARSE_KEY in slot.tensor.metadata_props:
            level = view.level if view.target.name == "tensorrt" else "warning"
            what = "is refused" if level == "error" else "is expanded at load: no faster, no less memory"
            yield Finding(
                "sparse-initializer", level, slot.name, "", f"a sparse initializer {what}",
                "store it dense, or by onnxcompress prune --storage sparse",
            )  # fmt: skip


def decoders(view: View) -> Iterator[Finding]:
    """Weights that functions of this package expand while the model runs, which ONNX Runtime folds at load."""
    for site in view.nodes:
        if site.node.domain == functions.DOMAIN and any(not view.static(value) for value in site.node.inputs):
            yield site.finding(
                "expanded-at-run-time", "warning", "expands a weight at every call: its parts are no constants",
                "make constants of them: onnxcompress compress --recipe lossless",
            )  # fmt: skip


RULES = (refused, unknown, limits, opset, sparse, decoders)
