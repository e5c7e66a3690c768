"""The domain of nodes that only a training graph has, between `fuse` and `lower`."""

from __future__ import annotations

DOMAIN = "onnxcompress.training"
