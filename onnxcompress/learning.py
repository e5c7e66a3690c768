"""Training in Python: the same words as the commands `distill` and `train`, and as the passes of a recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from onnxcompress import healing, registry
from onnxcompress.api import DataOptions
from onnxcompress.contract import Progress
from onnxcompress.recipe import make_pass
from onnxcompress.training.settings import Settings
from onnxcompress.training.targets import Objective
from onnxcompress.training.words import chosen

Path = str | os.PathLike[str]
Metric = str | Callable[..., Any] | None


def distill(
    teacher: Path,
    student: Path,
    *,
    out: Path,
    data: Any,
    evaluate: Any = None,
    metric: Metric = None,
    patience: int | None = None,
    init: str = "keep",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    data_options: DataOptions | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    **parameters: Any,
) -> dict[str, Any]:
    """Heal the model at `student`: train it to give the outputs of that at `teacher`, and labels where there are any.

    Args:
        out: where to save the result.
        data: what to train on (anything `open_data` takes).
        evaluate, metric: what the best epoch is kept by; the weights that came in are epoch 0.
        patience: epochs without a better score after which it stops.
        init: "keep" starts from the student's weights, "random" draws them anew.
        threads: None for as many as there are cores; the result does not depend on it.
        resume: go on from the checkpoint that an interrupted run left beside `out`.
        parameters: those of the pass `distill` (`onnxcompress passes` lists them): epochs, batch, lr, temperature, ...

    Returns:
        The report: loss and score of every epoch, every setting as it was used, what became of each weight.

    Raises:
        OnnxCompressError: one line; nothing is written.
    """
    settings, objective, provider = _checked("distill", parameters, seed, patience)
    return healing.train(
        teacher,
        student,
        out,
        data=data,
        reading=data_options,
        settings=settings,
        objective=objective,
        evaluate=evaluate,
        metric=metric,
        provider=provider,
        threads=threads,
        resume=resume,
        init=init,
        progress=progress,
        say=say,
    )


def train(
    model: Path,
    *,
    out: Path,
    data: Any,
    evaluate: Any = None,
    metric: Metric = None,
    patience: int | None = None,
    init: str = "keep",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    data_options: DataOptions | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    **parameters: Any,
) -> dict[str, Any]:
    """Train the model at `model` on labels, or a language model on its next tokens.

    Arguments, report and errors are those of `distill`; `parameters` are those of the pass `finetune`.
    """
    settings, objective, provider = _checked("finetune", parameters, seed, patience)
    return healing.train(
        None,
        model,
        out,
        data=data,
        reading=data_options,
        settings=settings,
        objective=objective,
        evaluate=evaluate,
        metric=metric,
        provider=provider,
        threads=threads,
        resume=resume,
        init=init,
        progress=progress,
        say=say,
    )


def _checked(
    name: str, parameters: Mapping[str, Any], seed: int, patience: int | None
) -> tuple[Settings, Objective, str]:
    """Parameters of the pass `name`, checked as a recipe's are, as settings, objective and provider.

    Raises:
        RecipeError: an unknown one, or one out of its bounds.
    """
    made = make_pass(registry.load(name), parameters, name)
    words = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    settings, objective = chosen({**words, "seed": seed, "patience": patience})
    return settings, objective, words["provider"]
