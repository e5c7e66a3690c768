"""Which layer of a compressed model is to blame, from what comes out of each."""

from __future__ import annotations

from onnxcompress.diagnosis.diagnoser import diagnose
from onnxcompress.diagnosis.result import Diagnosis, LayerRow

__all__ = ["Diagnosis", "LayerRow", "diagnose"]
