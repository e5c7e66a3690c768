"""One set of words for a training: fields of `Settings` and `Objective`, options of commands, parameters of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnxcompress.training.settings import Settings
from onnxcompress.training.targets import Objective


def chosen(given: Mapping[str, Any]) -> tuple[Settings, Objective]:
    """What is in `given` by the names of the fields of `Settings` and `Objective`, as those two; the rest is ignored.

    `clip` 0 stands for no clipping, where an option or a recipe cannot say None.
    """
    values = dict(given)
    if values.get("clip") == 0:
        values["clip"] = None
    settings, objective = (
        {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}
        for kind in (Settings, Objective)
    )
    return Settings(**settings), Objective(**objective)
