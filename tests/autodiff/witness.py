"""Writes witness.npz, the gradients PyTorch computes in float64 of everything in `witnessed.py`.

    python tests/autodiff/witness.py          (needs PyTorch: pip install -e '.[cpu,test,yardstick]')

The forward results are first held to the reference evaluator, so that PyTorch was asked about the same function.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.autodiff import pytorch
from tests.autodiff.checking import prepared, reference, relative
from tests.autodiff.witnessed import FAMILIES, fake_quantization

FILE = pathlib.Path(__file__).with_name("witness.npz")


def witness(model: Any, feeds: dict[str, np.ndarray], wrt: list[str]) -> dict[str, Any]:
    """Seeds of the float outputs and the gradients of their sum, weighted with them."""
    rng = np.random.default_rng(0)
    given = {name: pytorch.tensor(array, torch.float64) for name, array in feeds.items()}
    for name in wrt:
        given[name].requires_grad_()
    names = [output.name for output in model.graph.output]
    results = pytorch.run(model, given, names, torch.float64)
    subject = model if _known(model) else prepared(model)
    for name, ours, theirs in zip(names, reference(subject, feeds, names), results, strict=True):
        error = relative(theirs.detach().numpy().astype(np.float64), np.asarray(ours, np.float64))
        if error > 1e-6:
            raise SystemExit(f"PyTorch has another {name}: off by {error:.2g}")
    seeds, total = {}, torch.zeros((), dtype=torch.float64)
    for name, y in zip(names, results, strict=True):
        if y.is_floating_point():
            seeds[name] = short(rng.uniform(0.5, 1.5, y.shape))
            total = total + (y * torch.from_numpy(seeds[name].astype(np.float64))).sum()
    total.backward()
    return {"feeds": feeds, "seeds": seeds, "gradients": {name: given[name].grad.numpy() for name in wrt}}


def _known(model: Any) -> bool:
    """Whether the reference evaluator knows its operators, in float64."""
    return not any(node.domain or node.op_type in ("GroupNormalization", "Swish") for node in model.graph.node)


def short(array: np.ndarray) -> np.ndarray:
    """float32 with few digits, which packs well."""
    return np.asarray(np.round(array * 1024) / 1024, np.float32)


def main() -> None:
    torch.set_num_threads(1)
    names, entries = [], []
    for family, cases in FAMILIES.items():
        for case in cases():
            feeds = {n: short(a) if a.dtype == np.float32 else np.asarray(a) for n, a in case.feeds.items()}
            floats = [name for name, array in feeds.items() if array.dtype == np.float32]
            wrt = list(case.wrt) if case.wrt is not None else floats
            case.feeds = feeds
            try:
                entry = witness(case.model(), feeds, wrt)
            except BaseException:
                print("at", case)
                raise
            names.append(f"{family}/{case}")
            entries.append({**entry, "model": case.model(), "run": case.run, "dynamic": case.dynamic})
    model, feeds = fake_quantization()
    names.append("quantization/QuantizeLinear-DequantizeLinear")
    entries.append({**learned_scale(feeds), "model": model, "run": True, "dynamic": False})
    write(names, entries)


def learned_scale(feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """PyTorch's fake quantization, with the gradient of its scale."""
    x, s = (torch.from_numpy(feeds[name]).requires_grad_() for name in "xs")
    y = torch._fake_quantize_learnable_per_tensor_affine(x, s.reshape(1), torch.tensor([4.0]), -128, 127, 1.0)
    seed = short(np.linspace(0.5, 1.5, y.numel()))
    (y * torch.from_numpy(seed)).sum().backward()
    gradients = {"x": x.grad.double().numpy(), "s": s.grad.double().numpy()}
    return {"feeds": feeds, "seeds": {"y": seed}, "gradients": gradients}


def write(names: list[str], entries: list[dict[str, Any]]) -> None:
    """All arrays of one type one after another; an index says what they are."""
    flat: dict[str, list[np.ndarray]] = {}
    index = []
    for name, entry in zip(names, entries, strict=True):
        row: dict[str, Any] = {"name": name, "run": entry["run"], "dynamic": entry["dynamic"]}
        bytes_ = np.frombuffer(entry["model"].SerializeToString(), np.uint8)
        for kind, arrays in (("model", {"": bytes_}), *((k, entry[k]) for k in ("feeds", "seeds", "gradients"))):
            row[kind] = {n: [str(a.dtype), list(a.shape)] for n, a in arrays.items()}
            for a in arrays.values():
                flat.setdefault(str(a.dtype), []).append(a.reshape(-1))
        index.append(row)
    arrays = {dtype: np.concatenate(parts) for dtype, parts in flat.items()}
    text = np.frombuffer(json.dumps({"torch": torch.__version__, "cases": index}).encode(), np.uint8)
    np.savez_compressed(FILE, index=text, **arrays)
    print(f"{len(entries)} gradients, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
