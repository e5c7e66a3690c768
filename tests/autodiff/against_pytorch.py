"""Whole networks against PyTorch: is ONNX Runtime's float32 gradient as near to float64 as PyTorch's own float32?

    python tests/autodiff/against_pytorch.py [NAME ...]       (needs PyTorch; ONNXCOMPRESS_ZOO for more than models/)

Prints, for the gradients of all weights together, |found - truth| / |truth| of both, and the same for the weight where
it is worst. PyTorch runs the same graph, operator by operator (`pytorch.py`), so both round the same network. With
--write, networks.npz keeps projections of the float64 gradients, which tests compare with where there is no PyTorch;
those of networks that were not named stay in it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.autodiff import networks, pytorch
from tests.autodiff.networks import Arrays

STORED = 5  # draws


def gradients(model: onnx.ModelProto, feeds: Arrays, seeds: Arrays, names: list[str], dtype: Any) -> dict[str, Any]:
    """PyTorch's, in `dtype`, of the weights that have an effect."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in names}
    given = {name: pytorch.tensor(array, dtype) for name, array in {**feeds, **arrays}.items()}
    for name in names:
        given[name].requires_grad_()
    results = pytorch.run(model, given, list(seeds), dtype)
    total = sum((y * pytorch.tensor(seeds[name], dtype)).sum() for name, y in zip(seeds, results, strict=True))
    total.backward()
    return {name: given[name].grad.numpy() for name in names if given[name].grad is not None}


def errors(found: Arrays, truth: Arrays) -> tuple[float, float]:
    """Relative error of all together, and of the worst weight; weights with next to no gradient aside."""
    off = {name: float(np.linalg.norm(found[name].astype(np.float64) - truth[name])) for name in truth}
    size = {name: float(np.linalg.norm(truth[name])) for name in truth}
    whole = float(np.linalg.norm(list(size.values())))
    worst = max(off[name] / size[name] for name in truth if size[name] > 1e-5 * whole)
    return float(np.linalg.norm(list(off.values()))) / whole, worst


class Compared:
    """One network over several draws of its inputs. `rows`: errors of ours and of PyTorch's float32."""

    def __init__(self, name: str, file: pathlib.Path, feeds_file: pathlib.Path, draws: int) -> None:
        self.name, self.names = name, list[str]()
        self.rows: list[tuple[float, float, float, float]] = []
        self.projections: list[np.ndarray] = []
        self.norms: list[float] = []
        model = networks.loaded(file)
        for draw in range(draws):
            feeds = networks.feeds_of(model, feeds_file, networks.LENGTHS.get(name), draw)
            seeds = networks.seeds_of(model, feeds)
            if not networks.weights_of(model) or not seeds:
                return
            ours = networks.ours(model, feeds, seeds)
            truth = gradients(model, feeds, seeds, list(ours), torch.float64)
            theirs = gradients(model, feeds, seeds, list(ours), torch.float32)
            idle = [n for n in ours if n not in truth and ours[n].any()]
            assert not idle, f"PyTorch sees no effect of {idle}"
            self.names = list(truth)
            self.rows.append((*errors(ours, truth), *errors(theirs, truth)))
            if draw < STORED:
                self.projections.append(networks.projections(truth, self.names))
                self.norms.append(float(np.linalg.norm([np.linalg.norm(a) for a in truth.values()])))

    def __str__(self) -> str:
        """Medians over the draws: where float32 decides a Relu otherwise, a draw is an outlier."""
        if not self.rows:
            return f"{self.name:18} has no weights outside attributes, or nothing to differentiate"
        all_, worst, their_all, their_worst = np.median(np.array(self.rows), 0)
        return (
            f"{self.name:18} {len(self.names):4d} weights  all {all_:.1e} / {their_all:.1e} = {all_ / their_all:4.2f}"
            f"   worst weight {worst:.1e} / {their_worst:.1e} = {worst / their_worst:4.2f}"
            f"   worst draw, all {max(r[0] for r in self.rows):.1e} / {max(r[2] for r in self.rows):.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arrays = dict(np.load(networks.FILE, allow_pickle=False)) if arguments.names else {}
    index = json.loads(arrays.pop("index").tobytes()) if arrays else {}
    print("relative error of ONNX Runtime float32 / of PyTorch float32, against PyTorch float64")
    for name, files in networks.networks().items():
        if arguments.names and name not in arguments.names:
            continue
        began = time.perf_counter()
        compared = Compared(name, *files, arguments.draws)
        print(compared, f"{time.perf_counter() - began:.0f} s", flush=True)
        if compared.rows:
            own = [row[2] for row in compared.rows[:STORED]]
            index[name] = {"weights": compared.names, "norms": compared.norms, "float32": own}
            arrays[name] = np.array(compared.projections)
    if arguments.write:
        text = np.frombuffer(json.dumps(index).encode(), np.uint8)
        np.savez_compressed(networks.FILE, allow_pickle=False, index=text, **arrays)
        print(f"{networks.FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
