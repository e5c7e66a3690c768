"""The definitions, in files by family. Importing this package fills the table in `autodiff.definition`."""

from onnxcompress.autodiff.definitions import attention, fused, normalization

__all__ = ["attention", "fused", "normalization"]
