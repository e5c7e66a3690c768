"""The contract between the engine and a graph pass.

A pass receives an in-memory model and a `Run` (all it may use of the world) and returns a `Coverage`: what it touched,
what it
left, and why. The pipeline asserts that touched and left together are every weight there was, so a silent no-op is
impossible.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from onnxcompress.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from onnxcompress.model.weights import Weight


class Reason(enum.Enum):
    """Why a weight was left as it was. A closed set, so that reports can be counted and scripts can rely on it."""

    EXCLUDED = "excluded"  # the recipe's `select` leaves it out
    ROLE = "role"  # a bias, a normalization, a constant that is not a weight of this pass's kind
    DTYPE = "dtype"  # not a float this pass can treat
    TOO_SMALL = "too-small"  # would not become smaller
    ATTRIBUTE = "attribute"  # lives in an attribute of a node (ai.onnx.ml), not in a tensor
    ALREADY_ENCODED = "already-encoded"  # carries an encoding this pass does not replace
    NOT_FINITE = "not-finite"  # holds NaN or Inf
    UNSUPPORTED_OPSET = "unsupported-opset"  # needs operators this model's opset does not have
    UNSUPPORTED_OPERATOR = "unsupported-operator"  # consumed by an operator this pass does not treat
    GRAPH_OUTPUT = "graph-output"  # is itself an output of the model
    OVERRIDABLE = "overridable"  # an initializer that is also a graph input may be replaced by the caller (IR >= 4)
    SHARED = "shared"  # tied to a consumer that forbids the change
    NO_STATISTICS = "no-statistics"  # never seen in calibration
    WORSE = "worse"  # every setting tried lost more than it gained
    UNTOUCHED = "untouched"  # this pass does not re-encode weights
    FAILED = "failed"  # the pass failed and its work was undone
    BUDGET = "budget"  # the criterion selected nothing in this weight


@dataclasses.dataclass(frozen=True)
class Touched:
    """One weight a pass changed. `error`: relative root-mean-square error against the weight before the pass."""

    key: str
    bytes_before: int
    bytes_after: int
    error: float = 0.0
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Left:
    """One weight a pass left, with the reason."""

    key: str
    bytes: int
    reason: Reason
    detail: str = ""


@dataclasses.dataclass
class Coverage:
    """What a pass did to every weight, and how often it rewrote operators (`rewrites`: rule -> count)."""

    touched: list[Touched] = dataclasses.field(default_factory=list)
    left: list[Left] = dataclasses.field(default_factory=list)
    rewrites: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def keys(self) -> set[str]:
        """Every weight accounted for."""
        return {t.key for t in self.touched} | {entry.key for entry in self.left}

    def removed(self, before: Mapping[str, int], keys: Iterable[str], detail: str) -> None:
        """Account for weights that a pass took out of the model. `before`: bytes by key."""
        self.touched += [Touched(key, before[key], 0, detail=detail) for key in keys]

    @property
    def changed(self) -> bool:
        """True when the pass changed anything at all."""
        return bool(self.touched or any(self.rewrites.values()))


@dataclasses.dataclass(frozen=True)
class Select:
    """Which weights a pass may treat, by shell patterns over the weight's key, its consumers' node names and op types.

    `include`: at least one pattern must match (empty: everything). `exclude`: no pattern may match.
    `overrides`: pattern -> parameters that replace the pass's own for the weights it matches, in order.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take one pattern given as a string for a list of one; its letters are no patterns."""
        for name in ("include", "exclude"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))

    def names(self, weight: Weight) -> list[str]:
        """The names by which a weight can be selected."""
        names = [weight.key]
        for use in weight.uses:
            names += [use.node_name, use.op_type]
        return [name for name in names if name]

    def allows(self, weight: Weight) -> bool:
        """True when `weight` is included and not excluded."""
        names = self.names(weight)
        included = not self.include or _matches(names, self.include)
        return included and not _matches(names, self.exclude)

    def parameters(self, weight: Weight) -> dict[str, Any]:
        """The overriding parameters for `weight`, later patterns winning."""
        found: dict[str, Any] = {}
        for pattern, values in self.overrides.items():
            if _matches(self.names(weight), [pattern]):
                found.update(values)
        return found


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a pass must be given: least opset, calibration data, gradients, labels."""

    opset: int = 1
    calibration: bool = False
    gradients: bool = False
    labels: bool = False


class Progress(Protocol):
    """Progress of one piece of work; the command line draws a bar, a log gets plain lines.

    `done` of `total` steps lie behind when it starts: an interrupted run did them. `now`: figures as they stand.
    """

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def step(self, count: int = 1, now: str = "") -> None: ...
    def done(self) -> None: ...


class Silent:
    """Progress for nobody."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def step(self, count: int = 1, now: str = "") -> None: ...
    def done(self) -> None: ...


class Feeder(Protocol):
    """Calibration or evaluation data: each iteration starts again and yields one call's feeds (input name -> array)."""

    def __iter__(self) -> Any: ...
    def digest(self) -> str: ...


@dataclasses.dataclass
class Run:
    """All a pass may use of the world. Nothing a pass writes into a model may depend on `work`, `threads` or time.

    `original`: the model as the recipe was given it, before any pass: a teacher, or what to compare with. All passes
    share it, so none may change it; its tensors are the caller's, and lie on disk where they did before. None only
    where a pass is applied outside a pipeline.

    `state`: a folder of this one pass for work that takes long and can go on from its middle. What a pass finds there
    it has left itself, in an interrupted run of the very same work: same model, recipe up to and with this pass, data,
    seed and versions. It is gone when the pass is done. None where nothing is kept.

    `evaluate`: the score of a model on the user's evaluation data, on one thread whatever `threads` is: what a pass
    decides by it must not depend on them. `higher_is_better`: which scores are the better ones.

    `reading`: how data is read (`labels`, `mapping`, `preprocess`, as `data.source.open_data` takes them), for a pass
    that opens some of its own.
    """

    work: pathlib.Path
    target: str = "cpu"
    seed: int = 0
    threads: int = 1
    prefer: str = "size"
    progress: Progress = dataclasses.field(default_factory=Silent)
    feeds: Feeder | None = None
    evaluate: Callable[[ir.Model], float] | None = None
    higher_is_better: bool = True
    original: ir.Model | None = None
    state: pathlib.Path | None = None
    reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def generator(self, name: str) -> np.random.Generator:
        """A random generator that depends on the seed and `name` alone."""
        import hashlib

        import numpy as np

        digest = hashlib.sha256(name.encode()).digest()[:8]
        return np.random.default_rng([self.seed, int.from_bytes(digest, "little")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A graph pass. Its fields are its parameters: typed, documented (`field(metadata={"doc": ...})`) and bounded.

    Subclasses set `name` and `needs` and write `apply`, which changes `model` in place and accounts for every weight.
    A pass gives weights another encoding, or rewrites operators; it does one of the two.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs()

    select: Select = dataclasses.field(default=Select(), metadata={"doc": "which weights to treat"})

    def __post_init__(self) -> None:
        """Refuse parameters out of bounds.

        Raises:
            RecipeError: names the pass, the parameter and its bounds.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name, field in fields.items():
            check_bounds(field, getattr(self, name), self.name)
        for pattern, values in self.select.overrides.items():
            for key, value in values.items():
                if key not in fields or key == "select":
                    raise RecipeError(f"{self.name}: select: overrides: {pattern}: there is no parameter {key!r}")
                check_bounds(fields[key], value, f"{self.name}: select: overrides: {pattern}")

    def refuses(self, weight: Weight) -> tuple[Reason, str] | None:
        """Why this pass would leave `weight`, as far as that shows before any work; None where it would try.

        `inspect` asks this of the passes that override it.
        """
        return None

    def lacks(self, run: Run) -> str:
        """What this pass needs and `run` does not give it, "" for nothing; asked of every pass before the first runs.

        Raises:
            OnnxCompressError: a file that its parameters name cannot be used.
        """
        if self.needs.calibration and run.feeds is None:
            return "measures activations and needs data: --calibration DATA"
        return ""

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        """Change `model` in place.

        Raises:
            PassError: the model cannot be treated; the pipeline then discards the half-changed model.
        """
        raise NotImplementedError


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


def check_bounds(field: dataclasses.Field[Any], value: Any, where: str) -> None:
    """Refuse a parameter's value that is out of the bounds its field declares.

    Raises:
        RecipeError: names `where`, the parameter and its bounds.
    """
    choices = field.metadata.get("choices")
    if choices and value not in choices and (value is not None or field.default is not None):
        raise RecipeError(f"{where}: {field.name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    for key, (words, holds) in _BOUNDS.items():
        bound = field.metadata.get(key)
        if bound is None or value is None:
            continue
        try:
            held = holds(value, bound)
        except TypeError as error:
            raise RecipeError(f"{where}: {field.name} must be a number, not {value!r}") from error
        if not held:
            raise RecipeError(f"{where}: {field.name} must be {words} {bound}, not {value!r}")


def parameter(default: Any, doc: str, **bounds: Any) -> Any:
    """A field of a pass with its documentation and bounds (`ge`, `gt`, `le`, `lt`, `choices`).

    `file=True`: the value names a file or folder the pass reads. What it holds, not where it lies, then counts: for
    `--resume`, and for what the result says it was made with.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds})
