"""The range of any activations over calibration data, flat in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.feeding import batches, outputs
from onnxcompress.calibration.sites import Sites
from onnxcompress.calibration.statistic import MinMax, Statistic

S = TypeVar("S", bound=Statistic)


def observe(
    model: ir.Model, names: Sequence[str], feeder: Iterable[Any], new: Callable[[], S], *, threads: int = 1
) -> dict[str, S]:
    """A statistic `new()` of each value over all data; padding is kept out. Memory: all of them for one call.

    `names`: with the path of their scope (`bridge.scopes`). What cannot be seen from outside is left out.
    """
    tapped, where, computed = Sites(model).seen(names)
    found = {name: new() for name in where}
    wanted = list(dict.fromkeys([*where.values(), *computed.values()]))
    for results, valid in outputs(tapped, wanted, feeder, threads=threads):
        for name, statistic in found.items():
            if name not in computed or np.any(results[computed[name]]):
                statistic.update(np.asarray(results[where[name]]), valid)
    return found


def ranges(model: ir.Model, names: Sequence[str], feeder: Iterable[Any], *, threads: int = 1) -> dict[str, MinMax]:
    """The range of each value over all data.

    Bounds are computed inside the graph, so that no activation leaves it, unless the data has padding to keep out.
    """
    first = next(iter(batches(feeder, 1)), None)
    if first is not None and first[1] is not None:
        return observe(model, names, feeder, MinMax, threads=threads)
    sites = Sites(model)
    bounds: dict[str, tuple[str, str]] = {}
    for name in names:
        if name in sites:
            ends = [sites.add(name, op, [sites.value(name)], {"keepdims": 0}, scalar=True) for op in _BOUNDS]
            bounds[name] = sites.name(name, ends[0]), sites.name(name, ends[1])
    tapped, where, computed = sites.seen([end for pair in bounds.values() for end in pair])
    found = {name: MinMax() for name, pair in bounds.items() if all(end in where for end in pair)}
    wanted = list(dict.fromkeys([*where.values(), *computed.values()]))
    for results, _ in outputs(tapped, wanted, feeder, threads=threads):
        for name, statistic in found.items():
            low, high = bounds[name]
            if low in computed and not np.any(results[computed[low]]):
                continue
            least, most = np.asarray(results[where[low]]), np.asarray(results[where[high]])
            if least.size:
                statistic.update_bounds(float(least.min()), float(most.max()), 1)
    return found


_BOUNDS = ("ReduceMin", "ReduceMax")
