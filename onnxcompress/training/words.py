"""One set of words for a training: fields of `Settings` and `Objective`, options of commands, parameters of passes,
and what a report says was used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.training.optimizers import named
from onnxcompress.training.settings import Settings
from onnxcompress.training.targets import Objective, Target


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


def used(
    settings: Settings, objective: Objective, targets: Sequence[Target], *, epochs: int, batch: int
) -> dict[str, Any]:
    """All of both by the names of their fields, with what came in the place of a None, so that it can be given again.

    `temperature` is by output, since each may have its own; what had no part in the training stays None.
    """
    optimizer = named(settings.optimizer, settings.weight_decay, settings.momentum)
    soft = {t.head.output: t.temperature for t in targets if t.soft and t.kind in ("classes", "binary")}
    mixed = any(target.soft and target.labels is not None for target in targets)
    return {
        **dataclasses.asdict(settings),
        **dataclasses.asdict(objective),
        "epochs": epochs,
        "batch": batch,
        "lr": settings.peak,
        "weight_decay": optimizer.weight_decay,
        "batch_norm": settings.batch_norm or "frozen",
        "temperature": soft or None,
        "alpha": objective.share if mixed else None,
    }
