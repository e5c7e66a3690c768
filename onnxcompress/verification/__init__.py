"""Proof in the file: every weight is its parent's, as far as its encoding allows; without data, without a run."""

from __future__ import annotations

from onnxcompress.verification.result import Problem, Verification, WeightProof
from onnxcompress.verification.verifier import verify

__all__ = ["Problem", "Verification", "WeightProof", "verify"]
