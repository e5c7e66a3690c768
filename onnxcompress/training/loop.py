"""The training loop: epochs of shuffled batches, schedule, evaluation, checkpoints, and a stop where numbers end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from onnxcompress.contract import Progress
from onnxcompress.errors import OnnxCompressError, PassError
from onnxcompress.training.average import Average
from onnxcompress.training.checkpoint import Checkpoint, Checkpoints, Epoch
from onnxcompress.training.culprit import first_not_finite
from onnxcompress.training.gradual import Gradual
from onnxcompress.training.order import Order, split
from onnxcompress.training.runner import Runner
from onnxcompress.training.schedules import Schedule
from onnxcompress.training.step import TrainingGraph

SAVED_EVERY = 30.0  # seconds between checkpoints within an epoch


class Feeds(Protocol):
    """What a call is fed with."""

    def __call__(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        """All inputs of one call but parameters and scalars, for the samples of these indices."""

    def not_finite(self, indices: np.ndarray) -> str:
        """Which of these samples holds a number that is none, and where, in words; nothing where all is finite."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, and which epoch is the best. `call`: samples of an update that one run of the graph takes.

    `patience`: epochs without a better score after which training ends; the best one's parameters are returned.
    """

    epochs: int
    call: int
    patience: int | None = None
    higher_is_better: bool = True


def is_better(score: float, than: float | None, higher: bool = True) -> bool:
    """Whether `score` is better, which nan never is, and any number is than none."""
    if than is None or math.isnan(than):
        return not math.isnan(score)
    return score > than if higher else score < than


class Loop:
    """One training. `score`: from parameters by leaf to a score, called after every epoch.

    `average`: then its values are evaluated and returned. `gradual`: masks that grow; epochs before they are grown are
    evaluated, but never the best.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        runner: Runner,
        order: Order,
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
        self._graph, self._runner, self._order, self._feeds = graph, runner, order, feeds
        self._plan, self._schedule, self._checkpoints, self._progress = plan, schedule, checkpoints, progress
        self._score, self._on_epoch, self._average, self._gradual = score, on_epoch, average, gradual
        self._at = Checkpoint(0, {})
        self._began = 0.0

    def run(self, *, resume: bool = False) -> dict[str, np.ndarray]:
        """Train to the end; the parameters by leaf (of the best epoch where there is a score).

        Raises:
            PassError: the loss or the gradient is no longer finite; the last good state is kept as the checkpoint.
        """
        found = self._checkpoints.load() if resume else None
        if found is not None:
            self._at = found
            self._restore(found.state)
            found.state = {}
            for epoch in found.history:
                self._tell(epoch)
        self._progress.start("training", self._order.updates(self._plan.epochs), done=self._at.step)
        while len(self._at.history) < self._plan.epochs and not self._is_enough():
            self._epoch(len(self._at.history))
        self._progress.done()
        return self._at.best or self._values()

    @property
    def steps(self) -> int:
        """Updates done."""
        return self._at.step

    @property
    def history(self) -> list[Epoch]:
        """The epochs done, also those before an interrupt."""
        return self._at.history

    @property
    def kept(self) -> int | None:
        """The number of the epoch whose parameters `run` returned; None: nothing was evaluated, it was the last."""
        return self._at.kept or None

    @property
    def score(self) -> float | None:
        """That of the epoch `kept`."""
        return self._at.history[self._at.kept - 1].score if self._at.kept else None

    def _epoch(self, epoch: int) -> None:
        self._began = time.monotonic() - self._at.sums[2]
        saved = time.monotonic()
        for update in range(self._at.step, self._order.updates(epoch + 1)):
            self._update(epoch, split(self._order.samples(update), self._plan.call))
            if time.monotonic() - saved > SAVED_EVERY:
                self._keep()
                saved = time.monotonic()
        loss, count, _ = self._at.sums
        score = self._evaluated(epoch)
        self._at.sums = (0.0, 0, 0.0)
        seconds = time.monotonic() - self._began
        self._at.history.append(Epoch(epoch + 1, loss / max(1, count), seconds, score, self._plan.epochs))
        if epoch + 1 < self._plan.epochs:
            self._keep()
        self._tell(self._at.history[-1])

    def _evaluated(self, epoch: int) -> float | None:
        """The score after `epoch`; its parameters are set aside where they are the best."""
        if self._score is None:
            return None
        parameters = self._values()
        score = self._score(parameters)
        is_whole = self._gradual is None or self._gradual.is_reached(self._at.step)
        if is_whole and is_better(score, self.score, self._plan.higher_is_better):
            self._at.best, self._at.kept = parameters, epoch + 1
        return score

    def _tell(self, epoch: Epoch) -> None:
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def _update(self, epoch: int, chosen: Sequence[np.ndarray]) -> None:
        step = self._at.step
        if self._gradual is not None and self._gradual.rise.is_due(step):
            self._runner.set_buffers(self._gradual.grow(step, self._graph.values(self._runner.read())))
        feeds = [self._feeds(indices) for indices in chosen]
        loss, norm = self._runner.step(feeds, self._schedule(step), step + 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(epoch, loss, norm, chosen, feeds)
        if self._average is not None:
            self._average.update(step + 1)
        self._at.step = step + 1
        total, count, _ = self._at.sums
        self._at.sums = (total + loss, count + 1, time.monotonic() - self._began)
        self._progress.step(now=self._figures())

    def _figures(self) -> str:
        """How it stands: the epoch, its mean loss so far, the last score."""
        loss, count, _ = self._at.sums
        last = self._at.history[-1].score if self._at.history else None
        score = "" if last is None else f", score {last:.4f}"
        return f"epoch {len(self._at.history) + 1} of {self._plan.epochs}, loss {loss / max(1, count):.4f}{score}"

    def _stop(
        self, epoch: int, loss: float, norm: float, chosen: Sequence[np.ndarray], feeds: Sequence[Mapping[str, Any]]
    ) -> NoReturn:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        if all(np.isfinite(array).all() for array in self._runner.read().values()):
            self._keep()  # else the update before this step overflowed, and what was kept earlier stays
        path = self._checkpoints.path
        kept = f"; the last good state is kept in {path}" if path is not None and path.exists() else ""
        wrong = next(filter(None, map(self._feeds.not_finite, chosen)), "")
        culprit = self._culprit(feeds)
        mend = "a lower --lr may help" + (", with --resume from there on" if kept else "")
        if wrong:
            mend = f"the data holds values that are not finite: {wrong}"
        raise PassError(f"step {self._at.step + 1} (epoch {epoch + 1}): {what}, {culprit}{kept}; {mend}")

    def _culprit(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> str:
        """The first tensor of the step's forward pass that is not finite, else of the gradients, in words.

        Where all of these are finite, and the sum of their squares is not, the largest.
        """
        for call in self._runner.inputs(feeds):
            with contextlib.suppress(OnnxCompressError):  # what it says of the loss must not hinge on this
                if found := first_not_finite(self._graph, call):
                    return f"first in {found}"
        gradients, leaves = self._runner.gradients(), self._graph.leaves
        for leaf in leaves:
            if not np.isfinite(gradients[leaf.name]).all():
                return f"first in the gradient of {leaf.key!r}"
        largest = max(leaves, key=lambda leaf: float(np.abs(gradients[leaf.name]).max(initial=0)))
        return f"most of it in the gradient of {largest.key!r}"

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

    def _is_enough(self) -> bool:
        """True when the best epoch lies further back than patience allows."""
        if self._plan.patience is None or not self._at.kept:
            return False
        return len(self._at.history) - self._at.kept >= self._plan.patience
