"""One file for providers we do not know: no kernel's order of summation may be relied on, so weights stay within 64.

x86 without VNNI, OpenVINO on it (1.24) and others add two u8 x s8 products in 16 bits; 2 * 255 * 64 fits.
"""

from __future__ import annotations

import dataclasses

from onnxcompress.targets.cpu import CPU

PORTABLE = dataclasses.replace(
    CPU,
    name="portable",
    weights="reduced",
    strict=True,
    domains=frozenset({"", "ai.onnx", "ai.onnx.ml"}),
)
