"""Finds the installed passes by their entry points; onnx-ir and onnxscript passes by module path."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.errors import PassError, RecipeError

if TYPE_CHECKING:
    import onnx_ir as ir

GROUP = "onnxcompress.passes"
_FOREIGN = ("onnx_ir.", "onnxscript.")


@functools.cache
def names() -> tuple[str, ...]:
    """Names of the installed passes, sorted."""
    return tuple(sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)}))


def load(name: str) -> type[Pass]:
    """The class of pass `name`.

    Raises:
        RecipeError: no such pass is installed, or it cannot be imported.
    """
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in entries:
        raise RecipeError(
            f"there is no pass {name!r}{did_you_mean(name, entries)}; installed: {', '.join(sorted(entries))} "
            "(a pass added since the last `pip install` becomes visible with the next one)"
        )
    try:
        found = entries[name].load()
    except Exception as error:  # a third party's module may fail in any way
        raise RecipeError(f"pass {name!r} ({entries[name].value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise RecipeError(f"pass {name!r} ({entries[name].value}) is not a subclass of onnxcompress.contract.Pass")
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign(Pass):
    """A pass of onnx-ir or onnxscript (`onnx_ir.passes.common:IdentityEliminationPass`) as a step of a recipe."""

    name: ClassVar[str] = "foreign"
    path: str = parameter("", "module:Class of an onnx_ir or onnxscript pass that needs no arguments")

    def build(self) -> Any:
        """The pass it wraps.

        Raises:
            RecipeError: there is none at that path.
        """
        module, _, name = self.path.partition(":")
        if not module.startswith(_FOREIGN):
            raise RecipeError(
                f"{self.path!r}: only passes of {' and '.join(p[:-1] for p in _FOREIGN)} go by module path"
            )
        import onnx_ir.passes

        try:
            found = getattr(importlib.import_module(module), name)
            if not (isinstance(found, type) and issubclass(found, onnx_ir.passes.PassBase)):
                raise RecipeError(f"{self.path!r} is not an onnx_ir pass")
            return found()
        except (ImportError, AttributeError, TypeError) as error:
            raise RecipeError(f"{self.path!r} cannot be used: {error}") from error

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        from onnxcompress.model.weights import weights

        built = self.build()
        if not built.in_place:
            raise PassError(f"{self.path}: only in-place passes can stand in a recipe")
        before = weights(model)
        held = {weight.key: weight.value.const_value for weight in before}
        sizes = {weight.key: weight.nbytes for weight in before}
        result = built(model)
        coverage = Coverage(rewrites={self.path.partition(":")[2]: int(result.modified)})
        after = {weight.key: weight for weight in weights(model)}
        coverage.removed(sizes, [key for key in sizes if key not in after], "removed by the pass")
        for key, size in sizes.items():
            if key not in after:
                continue
            if after[key].value.const_value is held[key] and after[key].nbytes == size:
                coverage.left.append(Left(key, size, Reason.UNTOUCHED))
            else:
                coverage.touched.append(Touched(key, size, after[key].nbytes, detail="stored anew by the pass"))
        return coverage
