"""What holds after each pass: the graph checks, ONNX Runtime loads and runs it, and how far its outputs moved."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.data.sizes import candidate_sizes
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.model import bridge, valid
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.sizes import tensor_bytes
from onnxcompress.model.weights import weights
from onnxcompress.runtime.latency import interleaved_latency
from onnxcompress.runtime.mapped import open_mapped
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation.agreement import Agreement, OutputAgreement

LATENCY_SECONDS = 0.5
# A model larger than this is run from files: to optimize it and its original at once takes six to eight times its size.
MAPPED_BYTES = 512 << 20
# ONNX Runtime 1.32 of an output or an input in bfloat16, float8, or 4 or 2 bits, which numpy has no type for.
_NO_ARRAY = ("No corresponding Numpy type", "be converted to MLDataType")
MOST_EXPANSION = 32  # a float32 weight stored in 1 bit an element


@dataclasses.dataclass(frozen=True)
class Proof:
    """One run of a changed model beside the original, on the same feeds.

    `latency_ratio`: original / changed, one thread; above 1 the changed model is faster. `inputs`: data or synthetic.
    """

    agreement: tuple[OutputAgreement, ...]
    latency_ratio: float | None
    inputs: str

    @property
    def cosine(self) -> float | None:
        """The least cosine over the floating-point outputs."""
        found = [a.cosine for a in self.agreement if a.cosine is not None]
        return min(found) if found else None

    @property
    def top1(self) -> float | None:
        """The least share of unchanged decisions over the outputs that are class scores."""
        found = [a.top1 for a in self.agreement if a.top1 is not None]
        return min(found) if found else None


class Prover:
    """Holds the original's session, one call's `feeds` and the outputs to compare with.

    `large`: too large to be proved after each pass. From `MAPPED_BYTES` on nothing is optimized, and no time compared.
    """

    def __init__(
        self,
        original: ir.Model,
        feeds: Iterable[Mapping[str, np.ndarray]] | None,
        seed: int = 0,
        work: pathlib.Path | None = None,
    ) -> None:
        """`work`: a folder on disk for what is too large for memory (None: the system's)."""
        size = expanded_bytes(original)
        self.large = size > DEFAULT.inline_bytes
        self._mapped = size > MAPPED_BYTES
        self.inputs = "synthetic" if feeds is None else "data"
        self._work = work if work is not None else pathlib.Path(tempfile.gettempdir())
        self._held = contextlib.ExitStack()  # the original's session, as long as it is compared in time
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(self._open(original))
            self.feeds, self._reference = _first_call(session, original, feeds, seed)
            self._finite = {name: _is_finite(value) for name, value in self._reference.items()}
            if not self._mapped:
                self._held = stack.pop_all()
        self._session = None if self._mapped else session

    def close(self) -> None:
        """Release the original's session."""
        self._held.close()

    def __enter__(self) -> Prover:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prove(self, model: ir.Model) -> Proof:
        """Check, load and run `model`.

        Raises:
            PassError: it does not check, load or run, its outputs have another shape, or are no longer finite.
        """
        if not self._mapped:
            _check(model)
        try:
            with self._open(model) as session:
                outputs = session.run(_known(session, self.feeds))
                agreement = self._compare(outputs)
                ratio = self._latency(session)
        except (ModelError, DataError) as error:
            raise PassError(f"what it made does not run: {error}") from error
        return Proof(agreement, ratio, self.inputs)

    def _open(self, model: ir.Model) -> contextlib.AbstractContextManager[Session]:
        return open_mapped(model, self._work) if self._mapped else open_session(model)

    def _compare(self, outputs: Mapping[str, Any]) -> tuple[OutputAgreement, ...]:
        missing = [name for name in self._reference if name not in outputs]
        if missing:
            raise PassError(f"what it made has lost the output {missing[0]!r}")
        agreement = Agreement()
        agreement.update(self._reference, outputs, count=_rows(self.feeds))
        results = tuple(agreement.results())
        for result in results:
            if result.mismatch:
                raise PassError(
                    f"output {result.name!r} of what it made does not fit the original's: {result.mismatch}"
                )
            if result.nonfinite_new and self._finite[result.name]:
                raise PassError(
                    f"output {result.name!r} of what it made holds {result.nonfinite_new} values that are not finite"
                )
        return results

    def _latency(self, session: Session) -> float | None:
        if self._session is None:
            return None
        start = time.perf_counter()
        session.run(_known(session, self.feeds))
        once = max(time.perf_counter() - start, 1e-5)
        rounds = int(min(30, max(3, LATENCY_SECONDS / (2 * once))))
        pair = [_known(s, self.feeds) for s in (self._session, session)]
        return interleaved_latency([self._session, session], pair, rounds=rounds, warmup=1).ratios[1]


def expanded_bytes(model: ir.Model) -> int:
    """Bytes that ONNX Runtime holds once it has loaded `model`: all tensors, encoded weights expanded."""
    stored = tensor_bytes(model)
    if stored * MOST_EXPANSION <= MAPPED_BYTES:
        return stored
    return stored + sum(max(0, w.size * w.dtype.itemsize - w.nbytes) for w in weights(model))


def _check(model: ir.Model) -> None:
    try:
        valid.check(bridge.to_proto(model))
    except onnx.checker.ValidationError as error:
        said = " ".join(str(error).split())
        raise PassError(f"what it made is not valid ONNX: {said[:300]}") from error


def _first_call(
    session: Session, model: ir.Model, feeds: Iterable[Mapping[str, np.ndarray]] | None, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Feeds of one call the original accepts, and its outputs."""
    if feeds is not None:
        first = next(iter(feeds), None)
        if first is None:
            raise DataError("calibration data: holds no sample")
        return dict(first), session.run(_known(session, first))
    refused: Exception | None = None
    for sizes in candidate_sizes(model):
        made = next(iter(synthetic_feeds(model, seed=seed, samples=1, sizes=sizes))).feeds
        try:
            return dict(made), session.run(_known(session, made))
        except (DataError, ModelError) as error:
            refused = refused or error
            if any(words in str(error) for words in _NO_ARRAY):  # no data would change that
                raise
    raise DataError(f"made-up inputs do not fit this model, give --calibration DATA; first refusal: {refused}")


def _known(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {port.name for port in session.inputs}
    return {name: value for name, value in feeds.items() if name in names}


def _rows(feeds: Mapping[str, np.ndarray]) -> int:
    return next((len(value) for value in feeds.values() if np.ndim(value)), 1)


def _is_finite(value: Any) -> bool:
    array = np.asarray(value) if isinstance(value, np.ndarray) else None
    return array is None or array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
