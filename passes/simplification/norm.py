"""BatchNormalization that follows a convolution or a Gemm, folded into its weight and bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.passes.simplification import bench as b

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE}
_CHANNELS_FIRST = ("Conv", "ConvTranspose", "Gemm")


class BatchNorms:
    """Folds y = (op(x, W) + c - mean) * a + beta, with a = scale / sqrt(variance + epsilon), into W * a and
    (c - mean) * a + beta.

    1. Conv, ConvTranspose (also with groups) and Gemm (alpha as it is, beta 1), with and without bias.
    2. Computed in float64 and rounded once.
    3. The bias keeps its name where it is this operator's alone; else it takes the name of beta where that becomes
       free; else that of the BatchNormalization's output with the suffix `/bias`.

    Left alone: BatchNormalization in training mode, with spatial=0 or more than one output; after anything but these
    operators (Concat, pre-activation); when the operator's output is read by others or is a graph output; when its
    weight is used elsewhere, encoded, fed, or not float32 or float64; when a copy of a shared bias would make the file
    larger than before; when a folded value would not be finite.
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench

    def run(self) -> bool:
        """Fold all that can be; True when anything changed."""
        changed = False
        for scope in self.bench.scopes():
            if scope.opset < b.LEAST_OPSET:
                continue
            for norm in list(scope.graph):
                if b.standard(norm, "BatchNormalization") and self._fold(scope, norm):
                    self.bench.counts["fold-batch-norm"] += 1
                    changed = True
        return changed

    def _fold(self, scope: b.Scope, norm: ir.Node) -> bool:
        node = self._operator(norm)
        parameters = [self.bench.tensor(value) for value in norm.inputs[1:5]]
        if node is None or len(parameters) != 4:
            return False
        weight = node.inputs[1]
        held = self.bench.tensor(weight)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        offset = self.bench.tensor(bias)
        if weight is None or held is None or held.dtype not in _FLOATS or not self._alone(weight):
            return False
        if bias is not None and offset is None:
            return False
        arrays = [
            tensor.numpy() for tensor in (*parameters, offset) if tensor is not None and tensor.dtype == held.dtype
        ]
        if len(arrays) != (5 if bias is not None else 4):
            return False
        scale, beta, mean, variance, *rest = (array.astype(np.float64) for array in arrays)
        epsilon = norm.attributes.get("epsilon")
        with np.errstate(all="ignore"):
            factor = scale / np.sqrt(variance + (epsilon.as_float() if epsilon is not None else 1e-5))
            folded = self._scaled(node, held.numpy(), factor)
            shift = self._shift(node, rest[0] if rest else None, factor.size)
            if folded is None or shift is None:
                return False
            folded = folded.astype(held.numpy().dtype)
            shifted = ((shift - mean) * factor + beta).astype(folded.dtype)
        if not (np.isfinite(folded).all() and np.isfinite(shifted).all()):
            return False
        name, in_place = self._bias_name(norm, bias, shifted)
        if not in_place and self._growth(scope, norm, bias, name, shifted) > 0:
            return False
        self._apply(scope, norm, node, weight, folded, shifted, name, in_place)
        return True

    def _operator(self, norm: ir.Node) -> ir.Node | None:
        """The operator that `norm` can be folded into, as far as the graph around it tells."""
        if any(a.is_ref() for a in norm.attributes.values()) or any(output.name for output in norm.outputs[1:]):
            return None
        if _int(norm, "training_mode", 0) or not _int(norm, "spatial", 1) or len(norm.inputs) != 5:
            return None
        source = norm.inputs[0]
        node = source.producer() if source is not None else None
        if source is None or node is None or node.graph is not norm.graph or not b.standard(node, *_CHANNELS_FIRST):
            return None
        if source.is_graph_output() or len(source.uses()) != 1 or len(node.inputs) < 2:
            return None
        if any(a.is_ref() for a in node.attributes.values()):
            return None
        if node.op_type == "Gemm" and "beta" in node.attributes and node.attributes["beta"].as_float() != 1.0:
            return None
        return node

    @staticmethod
    def _alone(value: ir.Value) -> bool:
        return len(value.uses()) == 1 and not value.is_graph_output()

    @staticmethod
    def _scaled(node: ir.Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray | None:
        """The weight times `factor` along its output channels, in float64."""
        wide: np.ndarray = weight.astype(np.float64)
        if factor.ndim != 1:
            return None
        if node.op_type == "Gemm":
            axis = 0 if _int(node, "transB", 0) else 1
            if weight.ndim != 2 or weight.shape[axis] != factor.size:
                return None
            return np.asarray(wide * (factor[:, None] if axis == 0 else factor))
        ones = (1,) * (weight.ndim - 2)
        if node.op_type == "Conv":
            return np.asarray(wide * factor.reshape(-1, 1, *ones)) if weight.shape[0] == factor.size else None
        groups = _int(node, "group", 1)
        if weight.shape[0] % groups or weight.shape[1] * groups != factor.size:
            return None
        # Rows of group g make the output channels g * M/groups to (g + 1) * M/groups.
        grouped = wide.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return np.asarray(grouped * factor.reshape(groups, 1, -1, *ones)).reshape(weight.shape)

    @staticmethod
    def _shift(node: ir.Node, bias: np.ndarray | None, channels: int) -> np.ndarray | None:
        """The operator's own bias, one value a channel."""
        if bias is None:
            return np.zeros(channels)
        if node.op_type == "Gemm":
            # The bias of a Gemm broadcasts to [rows, channels].
            if bias.size == 1:
                return np.full(channels, bias.reshape(()))
            return bias.reshape(-1) if bias.shape in ((channels,), (1, channels)) else None
        return bias if bias.shape == (channels,) else None

    def _bias_name(self, norm: ir.Node, bias: ir.Value | None, new: np.ndarray) -> tuple[str, bool]:
        """The name of the folded bias, and whether it can be stored in the place of the old one."""
        if bias is not None and self._alone(bias):
            tensor = self.bench.tensor(bias)
            return bias.name or "", tensor is not None and tuple(tensor.shape.numpy()) == new.shape
        beta = norm.inputs[2]
        if beta is not None and beta.name and self._alone(beta) and beta.graph is norm.graph:
            return beta.name, False
        return self.bench.unused_name(f"{norm.outputs[0].name}/bias"), False

    def _growth(self, scope: b.Scope, norm: ir.Node, bias: ir.Value | None, name: str, new: np.ndarray) -> int:
        """Bytes that a new bias takes beyond those that become free with the BatchNormalization."""
        freed = {id(v): v for v in norm.inputs[1:] if v is not None and {u.node for u in v.uses()} == {norm}}
        if bias is not None and self._alone(bias):
            freed[id(bias)] = bias
        kept = [value for value in freed.values() if not value.is_graph_output()]
        gain = b.node_bytes(norm) + b.sum_stored(kept)
        new_bytes = b.new_bytes(name, new.nbytes, new.shape, as_node=self.bench.needs_nodes(scope))
        return new_bytes + len(name) + 2 - gain  # the operator names its bias

    def _apply(
        self,
        scope: b.Scope,
        norm: ir.Node,
        node: ir.Node,
        weight: ir.Value,
        folded: np.ndarray,
        shifted: np.ndarray,
        name: str,
        in_place: bool,
    ) -> None:
        what = f"BatchNormalization {norm.name or norm.outputs[0].name} folded into it"
        parameters = [value for value in norm.inputs[1:] if value is not None]
        old_bias = node.inputs[2] if len(node.inputs) > 2 else None
        self.bench.swap(weight, folded)
        self.bench.note(weight, what)
        source, output = node.outputs[0], norm.outputs[0]
        output_name, is_output = output.name, output.is_graph_output()
        output.name = f"{output_name}/folded"
        if source.shape is None or is_output:
            source.shape = output.shape
        source.type = output.type or source.type
        source.metadata_props.update(output.metadata_props)
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        source.name = output_name
        b.remove(norm)
        if in_place:
            assert old_bias is not None
            self.bench.swap(old_bias, shifted)
            self.bench.note(old_bias, what)
        else:
            self._new_bias(scope, node, old_bias, name, shifted, parameters, what)
        for value in parameters:
            self.bench.note(value, f"folded into {weight.name}", weight)
            self.bench.drop(value)

    def _new_bias(
        self,
        scope: b.Scope,
        node: ir.Node,
        old: ir.Value | None,
        name: str,
        shifted: np.ndarray,
        parameters: list[ir.Value],
        what: str,
    ) -> None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, None)
        beta = parameters[1]
        heirs = [v for v in (old, beta) if v is not None and v.name == name and not b.used(v)]
        for value in heirs:
            self.bench.drop(value)
        fresh = self.bench.put(scope, name, shifted, node)
        node.replace_input_with(2, fresh)
        for value in heirs:
            self.bench.note(value, what, fresh)
        if old is not None:
            self.bench.drop(old)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default
