"""What a training gives: parameters to put back into the model, and what was learned in words."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense
from onnxcompress.encodings.base import Encoding
from onnxcompress.errors import PassError
from onnxcompress.model.weights import weights
from onnxcompress.numerics.error import relative_rms
from onnxcompress.training import integers
from onnxcompress.training.biases import following
from onnxcompress.training.checkpoint import Epoch
from onnxcompress.training.targets import Objective, Target
from onnxcompress.training.ties import untie
from onnxcompress.training.zeros import FREED


@dataclasses.dataclass(frozen=True)
class Trained:
    """What was learned.

    `parameters`: weight key -> part of its encoding -> array. `left`: weights that were not trained, with the reason.
    `losses`: what each output was trained on, in words. `kept`: the epoch that the parameters are of, by its score; 0
    where the model as it came in scores better than all of them, and there are no parameters; None without scores.
    `used`: the settings by name, with what came in the place of a None (`words.used`).
    """

    parameters: dict[str, dict[str, np.ndarray]]
    epochs: list[Epoch]
    left: dict[str, str]
    losses: dict[str, str]
    steps: int
    kept: int | None = None
    used: dict[str, Any] = dataclasses.field(default_factory=dict)


def write(
    model: ir.Model, trained: Mapping[str, Mapping[str, np.ndarray]], work: pathlib.Path | None = None
) -> dict[str, float]:
    """Put trained parameters into the encodings of `model`'s weights, in place; the relative change of each weight.

    Nodes, and where and how each constant is stored, stay what they are.
    """
    found = {weight.key: weight for weight in weights(model, work)}
    places = integers.places(model)
    if not trained.keys() <= found.keys() | places.keys():
        untie(model)  # as the training did
        found = {weight.key: weight for weight in weights(model, work)}
    errors = places.store(trained)
    for key, parts in following(trained, found).items():
        if key in places:
            continue
        if key not in found:
            raise PassError(f"the weight {key!r} was lost in training (a bug)")
        weight = found[key]
        before = weight.array()
        new: Encoding
        new = Dense(parts[FREED].astype(before.dtype)) if FREED in parts else weight.encoding.updated(parts)
        errors[key] = relative_rms(before, new.decode())
        weight.replace(new)
    return errors


_NAMES = {
    "classes": "cross-entropy",
    "binary": "binary cross-entropy",
    "values": "squared error",
    "cosine": "cosine distance",
}


def told(target: Target, objective: Objective) -> str:
    """One target in words."""
    parts = []
    if target.labels is not None:
        alpha = objective.share if target.soft else 1.0
        parts.append(f"{alpha:g} x {_NAMES[target.kind]}")
    if target.is_feature:
        parts.append(f"{objective.feature_weight:g} x {_NAMES[target.kind]}")
    elif target.soft:
        share = f"{1 - objective.share:g} x " if parts else ""
        soft = target.kind in ("classes", "binary")
        parts.append(f"{share}{f'soft targets at T = {target.temperature:.4g}' if soft else _NAMES[target.kind]}")
    return " + ".join(parts)
