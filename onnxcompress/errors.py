"""One hierarchy of errors. Every message names the file, node or tensor it is about and what to do."""

from __future__ import annotations


class OnnxCompressError(Exception):
    """Anything a user's model, data, recipe or machine is the cause of: one clear line, exit code 2, no traceback."""


class ModelError(OnnxCompressError):
    """The model file is missing, broken, hostile, or uses something that cannot be represented."""


class SaveError(OnnxCompressError):
    """The output could not be written; whatever stood at the target is untouched."""


class DataError(OnnxCompressError):
    """Calibration or evaluation data is missing, does not fit the model's inputs, or cannot be read."""


class RecipeError(OnnxCompressError):
    """The recipe names an unknown pass or key, or a value is out of bounds."""


class PassError(OnnxCompressError):
    """A pass could not do its work on this model, or what it produced did not hold."""


class NothingToDo(PassError):
    """A pass can touch nothing in this model; nothing is written. The message says why."""


class RuntimeUnavailable(OnnxCompressError):
    """onnxruntime, or the requested execution provider, is missing or did not run."""


class MetricError(OnnxCompressError):
    """The metric is unknown, or the outputs and labels do not fit it."""
