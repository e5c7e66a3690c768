"""How fast models are on this machine, beside each other: latency, throughput by batch size, load time, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxcompress.contract import Progress, Silent
from onnxcompress.data.batch import Batch
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.sizes import Sizes, candidate_sizes
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, RuntimeUnavailable
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.sizes import saved_bytes
from onnxcompress.runtime.choice import Choice
from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.runtime.footprint import Footprint, footprint
from onnxcompress.runtime.latency import percentile, ratio, timed
from onnxcompress.runtime.providers import short_name
from onnxcompress.runtime.session import Session, onnxruntime, open_session
from onnxcompress.validation import placement
from onnxcompress.validation.pairing import check_fit, feeds_for, narrowed

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how it was measured. `load`: processes that wanted a core just before (one minute); None: not known."""

    cpu_class: str
    cores: int
    load: float | None
    onnxruntime: str
    provider: str
    threads: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model takes, whatever the batch. `nodes`: by provider. `footprint`: None for a model in memory."""

    model: str
    bytes: int
    nodes: dict[str, int]
    footprint: Footprint | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One model at one batch size.

    p50, p90, p99: seconds a call, each a time that was seen. `throughput`: samples a second at the median.
    `ratio`: of the first model's time to this one's in the same round, median, above 1 this one is faster, with the
    range that holds it with 95 % confidence; None for the first. `runs` timed after `warmup` untimed rounds; `stable`:
    no model became faster any more when timing began.
    """

    model: str
    batch: int
    p50: float
    p90: float
    p99: float
    throughput: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    runs: int
    warmup: int
    stable: bool


@dataclasses.dataclass(frozen=True)
class Bench:
    """What `bench` found. `skipped`: batch size -> why there are no rows for it. `inputs`: data or synthetic."""

    machine: Machine
    costs: tuple[Cost, ...]
    rows: tuple[Row, ...]
    skipped: dict[int, str]
    inputs: str
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        found = dataclasses.asdict(self)
        found["skipped"] = {str(batch): reason for batch, reason in self.skipped.items()}
        return {"schema": found.pop("schema"), **found}


def bench(
    models: Sequence[Loadable],
    *,
    batches: Sequence[int] = (1,),
    threads: int = 1,
    provider: str = "cpu",
    data: Any = None,
    mapping: Mapping[str, str] | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    seconds: float = 2.0,
    starts: int = 3,
    progress: Progress | None = None,
) -> Bench:
    """Time `models`, which take the same inputs, in turn on the same feeds; the first is what the others are held to.

    `models`: paths, bytes, ModelProto or ir.Model. `batches`: samples a call. `provider`: with options if need be
    (`runtime.choice`); `threads`: of the pool of each session. `data`: what `open_data` takes, of which the first
    samples are used; None makes up inputs. `seconds`: of timing for each batch size and model. `starts`: new processes
    to measure load and memory in, 0 for none.

    Raises:
        ModelError: a model cannot be loaded or run, or takes other inputs or gives other outputs than the first.
        DataError: the data does not fit.
        RuntimeUnavailable: the provider did not start, or took no node of a model.
    """
    if not models or not batches or min(batches) < 1 or not seconds > 0:
        raise OnnxCompressError("bench: wanted at least one model, batch sizes of at least 1, and more than 0 seconds")
    choice, given = Choice.of(provider), [_Model(source) for source in models]
    shown, busy = progress or Silent(), _load()
    shown.start("timing", len(set(batches)) + (len(given) if starts else 0))
    rows: list[Row] = []
    skipped: dict[int, str] = {}
    footprints: list[Footprint | None] = [None] * len(given)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(model.open(choice, threads)) for model in given]
        nodes = [_proved(choice, model, session) for model, session in zip(given, sessions, strict=True)]
        for model, session in zip(given[1:], sessions[1:], strict=True):
            check_fit(sessions[0], session, given[0].label, model.label)
        reading: dict[str, Any] = {"mapping": mapping, "preprocess": preprocess}
        for size in dict.fromkeys(batches):
            try:
                batch = _batch(given[0].model, sessions, size, data, reading, seed)
            except DataError as error:
                skipped[size] = str(error)
            else:
                rows += _rows(given, sessions, batch, seconds)
                footprints = _footprints(given, batch, choice, threads, starts, footprints, shown)
            shown.step()
    shown.done()
    if not rows:
        raise DataError(f"bench: {next(iter(skipped.values()))}")
    costs = [
        Cost(model.label, model.bytes, taken, found)
        for model, taken, found in zip(given, nodes, footprints, strict=True)
    ]
    machine = Machine(cpu_class(), _cores(), busy, str(onnxruntime().__version__), choice.name, threads)
    return Bench(machine, tuple(costs), tuple(rows), skipped, "synthetic" if data is None else "data")


class _Model:
    """One model: what to call it, what it takes on disk, how to open it."""

    def __init__(self, source: Loadable) -> None:
        self.model, self.given = load(source), source
        found = source_of(self.model)
        on_disk = found if not isinstance(source, ir.Model | onnx.ModelProto) else None
        self.path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
        self.label = self.path or self.model.graph.name or "the model"
        self.bytes = on_disk.bytes if on_disk is not None else saved_bytes(self.model)
        self._digest = on_disk.sha256 if on_disk is not None else ""

    def options(self, choice: Choice) -> dict[str, str]:
        """Of the provider, for this model."""
        quantized = any(node.op_type == "QuantizeLinear" for node in self.model.graph)
        return choice.provider_options(self._digest, quantized=quantized)

    def open(self, choice: Choice, threads: int) -> Session:
        """A session that tells where its nodes went."""
        source = self.given if isinstance(self.given, str | os.PathLike | bytes) else self.model
        return open_session(
            source,
            provider=short_name(choice.provider),
            threads=threads,
            config=placement.RECORD,
            provider_options=self.options(choice) or None,
        )


def _proved(choice: Choice, model: _Model, session: Session) -> dict[str, int]:
    """Nodes by provider; refused where the one asked for took none."""
    nodes, name = placement.placed(session), short_name(choice.provider)
    if name != "cpu" and not any(node.provider == name for node in nodes or []):
        raise RuntimeUnavailable(f"{model.label}: provider {choice.name} {placement.took_none(name, nodes)}")
    return placement.counted(nodes or [])


def _batch(
    model: ir.Model, sessions: Sequence[Session], size: int, data: Any, reading: Mapping[str, Any], seed: int
) -> Batch:
    """One call of `size` samples that every session takes."""
    if data is not None:
        specs = input_specs(model)
        for session in sessions[1:]:
            specs = narrowed(specs, session)
        batch = next(iter(open_data(data, specs, **reading, batch=size, limit=size, last="fill")))
        batches: Iterator[Batch] = iter([batch])
    else:
        batches = _made_up(model, size, seed)
    refused: Exception | None = None
    for batch in batches:
        try:
            for session in sessions:
                session.run(feeds_for(session, batch.feeds))
        except (DataError, ModelError) as error:
            refused = refused or error
            continue
        if batch.count != size:
            raise DataError(f"batch {size}: the model or the data has calls of {batch.count} samples")
        return batch
    raise DataError(f"batch {size}: the model does not take it; first refusal: {refused}")


def _made_up(model: ir.Model, size: int, seed: int) -> Iterator[Batch]:
    batch_axes = Sizes(input_specs(model)).batch
    for sizes in candidate_sizes(model):
        free = {key: value for key, value in sizes.items() if key not in batch_axes}
        yield from synthetic_feeds(model, seed=seed, samples=1, batch=size, sizes=free)


def _rows(given: Sequence[_Model], sessions: Sequence[Session], batch: Batch, seconds: float) -> list[Row]:
    feeds = [feeds_for(session, batch.feeds) for session in sessions]
    found = timed(sessions, feeds, budget=seconds * len(sessions), least=7, most=2000)
    rows = []
    for index, (model, times) in enumerate(zip(given, found.times, strict=True)):
        against = ratio(found.times[0], times) if index else None
        p50 = percentile(times, 0.5)
        rows.append(
            Row(
                model=model.label,
                batch=batch.count,
                p50=p50,
                p90=percentile(times, 0.9),
                p99=percentile(times, 0.99),
                throughput=batch.count / p50,
                ratio=against.value if against is not None else None,
                ratio_low=against.low if against is not None else None,
                ratio_high=against.high if against is not None else None,
                runs=len(times),
                warmup=found.warmup,
                stable=found.stable,
            )
        )
    return rows


def _footprints(
    given: Sequence[_Model],
    batch: Batch,
    choice: Choice,
    threads: int,
    starts: int,
    known: list[Footprint | None],
    progress: Progress,
) -> list[Footprint | None]:
    """Measured once, on the first batch size that the models take."""
    if not starts or any(entry is not None for entry in known):
        return known
    found: list[Footprint | None] = []
    for model in given:
        if model.path is None:
            found.append(None)
        else:
            settings: dict[str, Any] = {
                "provider": short_name(choice.provider),
                "provider_options": model.options(choice),
            }
            found.append(footprint(model.path, _taken(model, batch), threads=threads, starts=starts, **settings))
        progress.step()
    return found


def _taken(model: _Model, batch: Batch) -> dict[str, Any]:
    """The feeds in the float width that the model takes."""
    types = {spec.name: spec.dtype for spec in input_specs(model.model)}
    return {
        name: array.astype(types[name]) if types[name] is not None and array.dtype.kind == "f" else array
        for name, array in batch.feeds.items()
        if name in types
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
