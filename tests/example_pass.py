"""A complete pass: round weights to evenly spaced levels, and store each as a code of 1, 2, 4 or 8 bits."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.encodings import Codebook
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import weights
from onnxcompress.numerics.error import relative_rms


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvenLevels(Pass):
    """Round each weight to 2^bits evenly spaced levels between its least and its largest element."""

    name: ClassVar[str] = "even-levels"
    bits: int = parameter(8, "bits a code", choices=(1, 2, 4, 8))

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        seen, top = Coverage(), (1 << self.bits) - 1
        for weight in weights(model, run.work):
            array = weight.array().astype(np.float32)
            if not self.select.allows(weight):
                seen.left.append(Left(weight.key, weight.nbytes, Reason.EXCLUDED))
            elif weight.role not in WEIGHT_ROLES or weight.attribute or weight.encoding.kind != "dense":
                seen.left.append(Left(weight.key, weight.nbytes, Reason.ROLE, "no plain weight of a layer"))
            elif weight.size < 1024 or not np.isfinite(array).all():
                seen.left.append(Left(weight.key, weight.nbytes, Reason.TOO_SMALL, "or not finite"))
            else:
                levels = np.linspace(array.min(), array.max(), top + 1, dtype=np.float32)
                codes = np.rint((array - levels[0]) / (np.ptp(levels) or 1) * top).astype(np.uint8)
                new = Codebook(codes, levels.astype(weight.dtype), out=weight.dtype)
                seen.touched.append(Touched(weight.key, weight.nbytes, new.nbytes, relative_rms(array, new.decode())))
                weight.replace(new)
        return seen
