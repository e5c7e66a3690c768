"""What differentiation refuses, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.errors import OnnxCompressError


class NoGradient(OnnxCompressError):
    """An operator on the way from the outputs to the weights cannot be differentiated.

    `node`, `op_type`: where the gradient stops. `reason`: why. `cut_off`: names of the weights whose gradient would
    have passed there.
    """

    def __init__(self, node: str, op_type: str, reason: str, cut_off: Sequence[str] = ()) -> None:
        self.node, self.op_type, self.reason, self.cut_off = node, op_type, reason, tuple(cut_off)
        lost = ""
        if cut_off:
            named = ", ".join(self.cut_off[:3]) + (f" and {len(self.cut_off) - 3} more" if len(cut_off) > 3 else "")
            lost = f"; it cuts off {named}: leave these out of the training, or rewrite the operator"
        super().__init__(f"node {node!r} ({op_type}): {reason}{lost}")
