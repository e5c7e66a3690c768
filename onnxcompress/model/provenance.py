"""What a model was made from, in its own metadata: parent, recipe, data, versions, seed, metrics.

Nothing in it depends on time, paths or threads, so that the same work gives the same bytes; all of it together stays
under 2 KiB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress.model.limits import DEFAULT

PREFIX = "onnxcompress."
_FIELDS = ("parent", "recipe", "data", "versions", "seed", "metrics")
_VERSIONED = ("onnxcompress", "onnx", "onnxruntime", "numpy")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What went into a model. `parent`, `data`: sha256 of the model it was made from and of the calibration data.

    `recipe`: its text, or `sha256:...` of it where it would not fit. `metrics`: name -> value.
    """

    parent: str = ""
    recipe: str = ""
    data: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def versions() -> dict[str, str]:
    """Installed versions of what decides the bytes of a result; none of it is imported for that."""
    found = {}
    for name in _VERSIONED:
        for distribution in _RUNTIMES if name == "onnxruntime" else (name,):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def write(model: ir.Model, provenance: Provenance) -> None:
    """Put `provenance` into the model's metadata, in the place of any that was there, within `Limits.provenance_bytes`.

    What does not fit is shortened: first the recipe to its digest, then the metrics to as many as fit, in their order.
    """
    for field in _FIELDS:
        model.metadata_props.pop(PREFIX + field, None)
    recipe, metrics = provenance.recipe, dict(provenance.metrics)
    while True:
        entries = _entries(dataclasses.replace(provenance, recipe=recipe, metrics=metrics))
        if _size({**model.metadata_props, **entries}) < DEFAULT.provenance_bytes:
            break
        if len(recipe) > 71:
            recipe = f"sha256:{hashlib.sha256(provenance.recipe.encode()).hexdigest()}"
        elif metrics:
            metrics.popitem()
        else:
            entries = {key: entries[key] for key in (PREFIX + "parent",) if key in entries}
            break
    model.metadata_props.update(entries)


def read(model: ir.Model) -> Provenance | None:
    """The provenance in a model's metadata; None for a model this project did not write. Broken entries are ignored."""
    found = {field: model.metadata_props[PREFIX + field] for field in _FIELDS if PREFIX + field in model.metadata_props}
    if not found:
        return None
    seed = found.get("seed", "")
    return Provenance(
        parent=found.get("parent", ""),
        recipe=found.get("recipe", ""),
        data=found.get("data", ""),
        versions={key: str(value) for key, value in _mapping(found.get("versions", "")).items()},
        seed=int(seed) if seed.lstrip("-").isdigit() else None,
        metrics={
            key: float(value)
            for key, value in _mapping(found.get("metrics", "")).items()
            if isinstance(value, int | float)
        },
    )


def _entries(provenance: Provenance) -> dict[str, str]:
    texts = {
        "parent": provenance.parent,
        "recipe": provenance.recipe,
        "data": provenance.data,
        "versions": json.dumps(dict(sorted(provenance.versions.items())), separators=(",", ":"))
        if provenance.versions
        else "",
        "seed": "" if provenance.seed is None else str(provenance.seed),
        "metrics": json.dumps(dict(provenance.metrics), separators=(",", ":")) if provenance.metrics else "",
    }
    return {PREFIX + key: text for key, text in texts.items() if text}


def _size(metadata: Mapping[str, str]) -> int:
    """Bytes of all `onnxcompress.*` entries in the message: two fields of tag and length, in one of the same."""
    return sum(len(key.encode()) + len(text.encode()) + 9 for key, text in metadata.items() if key.startswith(PREFIX))


def _mapping(text: str) -> dict[str, object]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
