"""How to train, what to keep the best epoch by, and where it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import onnx_ir as ir

from onnxcompress.contract import Progress, Select, Silent
from onnxcompress.errors import PassError
from onnxcompress.model import provenance
from onnxcompress.training.checkpoint import Epoch
from onnxcompress.training.optimizers import OPTIMIZERS
from onnxcompress.training.schedules import KINDS, Kind
from onnxcompress.training.targets import Objective
from onnxcompress.training.zeros import KEEP_ZEROS, KeepZeros

BatchNorm = Literal["frozen", "trained"]
BATCH_NORMS: tuple[str, ...] = ("frozen", "trained")
RATES = {"adamw": 1e-3, "sgd": 1e-2}

FEWEST_EPOCHS, MOST_EPOCHS, UPDATES = 3, 30, 300

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": KINDS,
    "batch_norm": (None, *BATCH_NORMS),
    "keep_zeros": KEEP_ZEROS,
}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "epochs": (lambda n: n >= 1, "at least 1"),
    "batch": (lambda n: n >= 1, "at least 1"),
    "lr": (lambda x: 0 < x < math.inf, "a number above 0"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "momentum": (lambda x: 0 <= x < 1, "a share from 0 to below 1"),
    "warmup": (lambda x: 0 <= x < 1, "a share of the steps, from 0 to below 1"),
    "clip": (lambda x: 0 < x < math.inf, "a norm above 0, or None"),
    "sparsity": (lambda x: 0 <= x < 1, "a share from 0 to below 1"),
    "sparsity_until": (lambda x: 0 < x <= 1, "a share of the steps, above 0 and up to 1"),
    "ema": (lambda x: 0 < x < 1, "a decay between 0 and 1"),
    "patience": (lambda n: n >= 1, "at least 1"),
}
PACE = ("lr", "clip")
"""Settings that an interrupted training may go on with changed: after a loss that was not finite, with smaller ones."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. The defaults heal a compressed model without tuning.

    `epochs`: passes over the data; None is 3, or as many as make 300 updates, at most 30: a small set needs more of
    them. `batch`: samples an update. `lr`: peak learning rate; None is 1e-3 for AdamW, 1e-2 for SGD. `clip`: the norm
    gradients are clipped to, None for not at all. `relative`: AdamW's steps are in proportion to each weight's
    magnitude, so that one learning rate serves every model; False gives textbook AdamW.
    `batch_norm`: "frozen" (what None means, but to `healing.train` from random weights) normalizes by the running
    statistics as they are, "trained" by those of each batch, and moves the running ones (`batchnorm.track`).
    `keep_zeros`: which zeros of weights are structure and stay (`zeros.Keeping`).
    `learn_scales`: train the scales of quantized weights, too (`scales.gradient_scale`).
    `sparsity`: the share of zeros that layers' weights are brought to on the way, rising over the first share
    `sparsity_until` of the steps (`gradual.Rise`); None prunes nothing. `ema`: the decay of an exponential moving
    average of the parameters, which is then what is evaluated and returned (`average.Average`).
    `outputs`: names of the student's outputs to learn, empty for all. `inputs`: "STUDENT=TEACHER" for what the teacher
    calls otherwise. `patience`: see `loop.Plan`.
    """

    epochs: int | None = None
    batch: int = 32
    lr: float | None = None
    optimizer: str = "adamw"
    weight_decay: float | None = None
    momentum: float = 0.9
    schedule: Kind = "cosine"
    warmup: float = 0.05
    clip: float | None = 1.0
    relative: bool = True
    batch_norm: BatchNorm | None = None
    keep_zeros: KeepZeros = "auto"
    learn_scales: bool = False
    sparsity: float | None = None
    sparsity_until: float = 0.7
    ema: float | None = None
    seed: int = 0
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    patience: int | None = None
    select: Select = dataclasses.field(default_factory=Select)

    def __post_init__(self) -> None:
        """Refuse what no training can be.

        Raises:
            PassError: a number out of its range, or a word that is none of those there are.
        """
        for name, choices in _CHOICES.items():
            if (found := getattr(self, name)) not in choices:
                raise PassError(f"{name}: wanted {', '.join(str(c) for c in choices if c is not None)}, got {found!r}")
        for name, (holds, wanted) in _RANGES.items():
            found = getattr(self, name)
            if found is not None and not holds(found):
                raise PassError(f"{name}: wanted {wanted}, got {found}")

    def epochs_of(self, updates: float) -> int:
        """How many epochs of so many updates; a rest of an epoch that fills no batch is a part of one."""
        if self.epochs is not None:
            return self.epochs
        return min(max(FEWEST_EPOCHS, math.ceil(UPDATES / updates)), MOST_EPOCHS)

    @property
    def peak(self) -> float:
        """The learning rate that is used."""
        return RATES[self.optimizer] if self.lr is None else self.lr


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A score to keep the best epoch by. `patience` of the settings counts epochs without a better one.

    `before`: that of the student as it came in, where it may be what is kept: as epoch 0, if no epoch is as good.
    """

    score: Callable[[ir.Model], float]
    higher_is_better: bool = True
    before: float | None = None


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Where and how a training runs; nothing of it but `provider` and `threads` may change the result.

    `work`: folder for checkpoints and large arrays; None keeps no checkpoint. `say`: for lines a user should read.
    """

    provider: str = "cpu"
    threads: int = 1
    work: pathlib.Path | None = None
    resume: bool = False
    progress: Progress = dataclasses.field(default_factory=Silent)
    on_epoch: Callable[[Epoch], None] | None = None
    say: Callable[[str], None] = lambda text: None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pace(settings: Settings) -> dict[str, float | None]:
    """The settings `PACE`, as they are used."""
    return {"lr": settings.peak, "clip": settings.clip}


def identity(settings: Settings, objective: Objective, rest: Mapping[str, Any]) -> str:
    """What a checkpoint must have been made with, to go on from it: all but `PACE`."""
    what = {
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name not in PACE},
        "objective": dataclasses.asdict(objective),
        "versions": provenance.versions(),
        **rest,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
