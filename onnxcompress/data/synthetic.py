"""Feeds made up from the model alone, for when the user gives none: valid for the model's inputs, meaningless
otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.data.batch import Batch, ContentHash, Data
from onnxcompress.data.cast import is_float, is_integer
from onnxcompress.data.reach import index_bounds
from onnxcompress.data.sizes import IDS, Sizes
from onnxcompress.data.specs import InputSpec, input_specs
from onnxcompress.errors import DataError

_IDS = 100  # token ids stay below this when no table says how many there are
_RATE = 16_000  # Hz
_PAST = (0, 4)


def synthetic_feeds(
    model: ir.Model,
    *,
    seed: int = 0,
    samples: int = 4,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> SyntheticData:
    """Feeds for `samples` calls of `model`.

    Batch sizes go 1, 2, 1, 2 unless `batch` says otherwise, with past lengths 0, 0, 4, 4. Token ids are rows of the
    table they look up; masks are ones, token types zero, positions count up, flags alternate, everything else is
    noise of variance one. `sizes`: sizes of dynamic axes by symbol, or `input[axis]`; see `candidate_sizes` for what
    to try when a model refuses.

    Raises:
        DataError: an input is no tensor.
    """
    return SyntheticData(model, seed, samples, batch, dict(sizes or {}))


class SyntheticData(Data):
    """See `synthetic_feeds`. The same seed yields the same values, in any process."""

    def __init__(self, model: ir.Model, seed: int, samples: int, batch: int | None, sizes: dict[str, int]) -> None:
        self.specs = input_specs(model)
        self.ignored: list[str] = []
        self.has_labels = False
        for spec in self.specs:
            if spec.kind != "tensor":
                raise DataError(f"input {spec.name!r} is a {spec.kind}: its feeds cannot be made up, give data")
        self._seed, self._samples, self._batch = seed, samples, batch
        self._sizes = Sizes(self.specs, sizes)
        self._bounds = index_bounds(model)
        self._ids = sizes.get(IDS)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for call in range(self._samples):
            batch = self._batch or 1 + call % 2
            past = _PAST[call // 2 % 2]
            feeds = {spec.name: self._value(spec, call, batch, past) for spec in self.specs}
            count = self._count(feeds, batch)
            yield Batch(feeds, None, None, count, start)
            start += count

    def digest(self) -> str:
        """The sha256 (hex) of all values."""
        found = ContentHash()
        for batch in self:
            for name, array in batch.feeds.items():
                found.value(f"input {name}", array)
        return found.hexdigest()

    def len_hint(self) -> int:
        """The number of samples in all calls."""
        return sum(batch.count for batch in self)

    def _count(self, feeds: Mapping[str, np.ndarray], batch: int) -> int:
        firsts = {array.shape[0] for array in feeds.values() if array.ndim}
        return firsts.pop() if len(firsts) == 1 else batch if batch in firsts else 1

    def _value(self, spec: InputSpec, call: int, batch: int, past: int) -> np.ndarray:
        shape, name = self._sizes.shape(spec, batch, past), spec.name.lower()
        dtype = np.dtype(np.float32) if spec.dtype is None else spec.dtype
        generator = _generator(self._seed, spec.name, call)
        if dtype.kind == "O":
            return np.full(shape, "a", object)
        if dtype.kind == "b":
            return self._flags(shape, name, call, past)
        if "mask" in name:
            return np.ones(shape, dtype)
        if is_integer(dtype):
            return self._integers(spec.name, shape, dtype, generator, past)
        if dtype.kind == "c":
            return (generator.standard_normal(shape) + 1j * generator.standard_normal(shape)).astype(dtype)
        if not is_float(dtype):
            raise DataError(f"input {spec.name!r}: values of type {dtype} cannot be made up, give data")
        if name in ("sr", "sample_rate", "sampling_rate"):
            return np.full(shape, _RATE, dtype)
        return np.asarray(generator.standard_normal(shape, np.float32)).astype(dtype)

    def _flags(self, shape: tuple[int, ...], name: str, call: int, past: int) -> np.ndarray:
        if "mask" in name:
            return np.ones(shape, bool)
        size = int(np.prod(shape, dtype=np.int64))
        if "cache" in name:
            return np.full(shape, past > 0)  # a merged decoder reads its past only when told to
        alternating: np.ndarray = (np.arange(size) + call) % 2 == 0
        return alternating.reshape(shape)

    def _integers(
        self, given: str, shape: tuple[int, ...], dtype: np.dtype, generator: np.random.Generator, past: int
    ) -> np.ndarray:
        name, bound = given.lower(), self._bounds.get(given)
        if name in ("sr", "sample_rate", "sampling_rate"):
            return np.full(shape, _RATE, dtype)
        if bound is None and ("length" in name or name.endswith("lens")):
            return np.full(shape, self._sizes.sequence(), dtype)
        most = (1 << (8 * dtype.itemsize)) - 1 if dtype.kind == "u" and dtype.itemsize == 1 else _IDS - 1
        most = most if self._ids is None else self._ids - 1
        most = most if bound is None else bound - 1
        most = min(most, _largest(dtype))
        if "position" in name and shape:
            return np.minimum(np.broadcast_to(np.arange(shape[-1]) + past, shape), most).astype(dtype)
        if "token_type" in name or "segment" in name or "type_id" in name:
            return np.zeros(shape, dtype)
        return np.asarray(generator.integers(0, most, shape, endpoint=True)).astype(dtype)


def _largest(dtype: np.dtype) -> int:
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).max)
    return {"int4": 7, "uint4": 15, "int2": 1, "uint2": 3}.get(dtype.name, 1)


def _generator(seed: int, name: str, call: int) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()[:8]
    return np.random.default_rng([seed, call, int.from_bytes(digest, "little")])
