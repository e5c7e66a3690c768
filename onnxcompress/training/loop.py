"""The training loop: epochs of shuffled batches, schedule, evaluation, checkpoints, and a stop where numbers end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from onnxcompress.contract import Progress
from onnxcompress.errors import PassError
from onnxcompress.training.average import Average
from onnxcompress.training.checkpoint import Checkpoint, Checkpoints
from onnxcompress.training.gradual import Gradual
from onnxcompress.training.runner import Runner
from onnxcompress.training.samples import Samples, calls
from onnxcompress.training.schedules import Schedule
from onnxcompress.training.step import TrainingGraph

SAVED_EVERY = 30.0  # seconds between checkpoints within an epoch

Feeds = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""All inputs of one call but parameters and scalars, for the samples of these indices."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch of `planned` did. `score`: of the model after it, where there is something to evaluate it on."""

    number: int
    loss: float
    seconds: float
    score: float | None = None
    planned: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and in which steps: `batch` samples an update, at most `call` of them in one run of the graph.

    `patience`: epochs without a better score after which training ends; the best one's parameters are returned.
    """

    epochs: int
    batch: int
    call: int
    seed: int
    patience: int | None = None
    higher_is_better: bool = True

    def steps(self, samples: Samples) -> int:
        """Updates an epoch."""
        return samples.count // min(self.batch, samples.count)


class Loop:
    """One training. `score`: from parameters by leaf to a score, called after every epoch.

    `average`: then its values are evaluated and returned. `gradual`: masks that grow; epochs before they are grown are
    evaluated, but never the best.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        runner: Runner,
        samples: Samples,
        feeds: Feeds,
        plan: Plan,
        schedule: Schedule,
        checkpoints: Checkpoints,
        progress: Progress,
        score: Callable[[Mapping[str, np.ndarray]], float] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        average: Average | None = None,
        gradual: Gradual | None = None,
    ) -> None:
        self._graph, self._runner, self._samples, self._feeds = graph, runner, samples, feeds
        self._plan, self._schedule, self._checkpoints, self._progress = plan, schedule, checkpoints, progress
        self._score, self._on_epoch, self._average, self._gradual = score, on_epoch, average, gradual
        self._at = Checkpoint(0, {})

    def run(self, *, resume: bool = False) -> dict[str, np.ndarray]:
        """Train to the end; the parameters by leaf (of the best epoch where there is a score).

        Raises:
            PassError: the loss or the gradient is no longer finite; the last good state is kept as the checkpoint.
        """
        per_epoch = self._plan.steps(self._samples)
        found = self._checkpoints.load() if resume else None
        if found is not None:
            self._at = found
            self._restore(found.state)
        self._progress.start("training", per_epoch * self._plan.epochs)
        self._progress.step(self._at.step)
        for epoch in range(self._at.step // per_epoch, self._plan.epochs):
            self._epoch(epoch, per_epoch)
            if self._is_enough():
                break
        self._progress.done()
        return self._at.best or self._values()

    @property
    def steps(self) -> int:
        """Updates done."""
        return self._at.step

    def _epoch(self, epoch: int, per_epoch: int) -> None:
        began = saved = time.monotonic()
        order = self._samples.order(self._plan.seed, epoch)
        updates = list(calls(order, self._plan.batch, self._plan.call))
        for index in range(self._at.step - epoch * per_epoch, per_epoch):
            self._update(epoch, updates[index])
            if time.monotonic() - saved > SAVED_EVERY:
                self._keep()
                saved = time.monotonic()
        loss, count = self._at.sums
        entry = {"loss": loss / max(1, count)}
        self._at.sums = (0.0, 0)
        score = None
        if self._score is not None:
            parameters = self._values()
            score = self._score(parameters)
            if self._gradual is None or self._gradual.is_reached(self._at.step):
                entry["score"] = score
                if self._is_better(score):
                    self._at.best, self._at.score = parameters, score
        self._at.history.append(entry)
        if epoch + 1 < self._plan.epochs:
            self._keep()
        if self._on_epoch is not None:
            self._on_epoch(Epoch(epoch + 1, entry["loss"], time.monotonic() - began, score, self._plan.epochs))

    def _update(self, epoch: int, chosen: Sequence[np.ndarray]) -> None:
        step = self._at.step
        if self._gradual is not None and self._gradual.rise.is_due(step):
            self._runner.set_buffers(self._gradual.grow(step, self._graph.values(self._runner.read())))
        feeds = [self._feeds(indices) for indices in chosen]
        loss, norm = self._runner.step(feeds, self._schedule(step), step + 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(epoch, loss, norm)
        if self._average is not None:
            self._average.update(step + 1)
        self._at.step = step + 1
        total, count = self._at.sums
        self._at.sums = (total + loss, count + 1)
        self._progress.step()

    def _stop(self, epoch: int, loss: float, norm: float) -> NoReturn:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        self._at.state = self._with_others(self._runner.read())
        self._checkpoints.save(self._at)
        culprit = self._culprit()
        where = f", first in the update of {culprit}" if culprit else ""
        kept = f"; the last good state is kept in {self._checkpoints.path}" if self._checkpoints.path else ""
        raise PassError(
            f"step {self._at.step + 1} (epoch {epoch + 1}): {what}{where}{kept}; a lower --lr may help, or the data "
            "holds values that are not finite"
        )

    def _culprit(self) -> str:
        """The first weight whose gradient is not finite."""
        gradients = self._runner.gradients()
        found = (leaf.key for leaf in self._graph.leaves if not np.isfinite(gradients[leaf.name]).all())
        return next(found, "")

    def _keep(self) -> None:
        self._at.state = self._with_others(self._runner.read())
        self._checkpoints.save(self._at)
        self._at.state = {}

    def _values(self) -> dict[str, np.ndarray]:
        """What the model is made of as it stands: the averages where there are any."""
        values = self._average.values() if self._average else self._graph.values(self._runner.read())
        return values | (self._gradual.masks if self._gradual else {})

    def _with_others(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The runner's state, the averages and the masks."""
        average = self._average.state() if self._average else {}
        return {**state, **average, **(self._gradual.masks if self._gradual else {})}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        if self._average is not None:
            self._average.write(state)
        if self._gradual is not None:
            self._gradual.masks = {name: state[name] for name in self._gradual.masks}
            self._runner.set_buffers(self._gradual.masks)
        others = self._with_others({})
        self._runner.write({name: array for name, array in state.items() if name not in others})

    def _is_better(self, score: float) -> bool:
        if self._at.score is None or math.isnan(score):
            return not math.isnan(score)
        return score > self._at.score if self._plan.higher_is_better else score < self._at.score

    def _is_enough(self) -> bool:
        """True when the best epoch lies further back than patience allows."""
        if self._plan.patience is None or self._at.score is None:
            return False
        scores = [entry.get("score") for entry in self._at.history]
        return len(scores) - 1 - scores.index(self._at.score) >= self._plan.patience
