"""The options that several commands share, each written once; those of a training are the parameters of its pass."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import click

from onnxcompress.api import DataOptions
from onnxcompress.contract import Pass, Select
from onnxcompress.errors import DataError

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.Path(path_type=pathlib.Path)
TARGETS = click.Choice(["cpu", "cuda", "tensorrt", "portable"])


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, listed in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _common(threads: int | None, told: str) -> Callable[[F], F]:
    """What all commands take; `threads`: how many where none are named."""
    of_threads = f"the result does not depend on it  [default: {told}]"
    return stack(
        click.option("--json", "json_file", type=MODEL, metavar="FILE", help="write the full report here"),
        click.option("--seed", type=click.IntRange(min=0), help="for everything random  [default: 0]"),
        click.option("--threads", type=click.IntRange(min=1), default=threads, help=of_threads),
        click.option("-q", "--quiet", is_flag=True, help="print errors alone"),
        click.option("-v", "--verbose", is_flag=True, help="print all of it: every weight, layer or finding"),
    )


common_options = _common(1, "1")

reading_options = stack(
    click.option("--labels", metavar="KEY", help="array that holds the labels  [default: y]"),
    click.option("--map", "mapping", multiple=True, metavar="KEY=INPUT", help="array KEY feeds INPUT; may be repeated"),
    click.option("--preprocess", type=MODEL, metavar="FILE", help="YAML with transpose, scale, mean, std, dtype"),
    click.option("--limit", type=click.IntRange(min=1), help="use at most so many samples"),
)

data_options = stack(click.option("--batch", type=click.IntRange(min=1), help="samples a call"), reading_options)

select_options = stack(
    click.option(
        "--include", multiple=True, metavar="PATTERN", help="only weights whose name, node or operator matches"
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="no weights whose name, node or operator matches"),
)

metric_option = click.option(
    "--metric", metavar="M", help="accuracy, f1, spearman, perplexity, ... or file.py:function"
)

resume_option = click.option("--resume", is_flag=True, help="go on where an interrupted run stopped")

out_option = click.option("-o", "--out", type=MODEL, required=True, metavar="OUT", help="where to save the result")


init_option = click.option(
    "--init", type=click.Choice(["keep", "random"]), default="keep", show_default=True, help="weights to start from"
)


def training_options(kind: type[Pass]) -> Callable[[F], F]:
    """What the commands that train have in common: data, the parameters of their pass `kind`, evaluation."""
    return stack(
        click.option("--data", required=True, metavar="DATA", help="training data: .npz, folder, or file.py:function"),
        *pass_options(kind, leave=("data", "teacher", "select")),
        click.option(
            "--init",
            type=click.Choice(["keep", "random"]),
            default="keep",
            show_default=True,
            help="weights to start from",
        ),
        click.option("--eval", "evaluate", metavar="DATA", help="data to keep the best epoch by; needs --metric"),
        metric_option,
        click.option("--patience", type=click.IntRange(min=1), help="stop after so many epochs without a better score"),
        resume_option,
        select_options,
        reading_options,
        _common(None, "as many as there are"),
    )


def pass_options(kind: type[Pass], leave: Sequence[str]) -> Iterator[Callable[[F], F]]:
    """The parameters of a pass as options: one set of words, defaults and bounds for recipe and command line.

    `leave`: parameters that are no option. A list takes the singular as its option, which may be repeated.
    """
    types_of = typing.get_type_hints(kind, localns={"Select": Select})
    for field in dataclasses.fields(kind):
        if field.name not in leave:
            yield _option(field, types_of[field.name])


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[F], F]:
    name = f"--{field.name.replace('_', '-')}"
    given: dict[str, Any] = {"default": field.default, "help": field.metadata.get("doc", "")}
    given["show_default"] = field.default is not None and field.default != ()
    if hint is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, **given)
    if typing.get_origin(hint) is tuple:
        given["help"] += "; may be repeated"
        return click.option(name.removesuffix("s"), field.name, multiple=True, metavar="NAME", **given)
    return click.option(name, field.name, type=_type_of(hint, field.metadata), **given)


class _Number(click.FloatRange):
    """A number within bounds, which `nan` and `inf` are not, though Python reads them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        return found if math.isfinite(found) else self.fail(f"{value} is no number.", param, ctx)


def _type_of(hint: Any, bounds: Mapping[str, Any]) -> click.ParamType[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return click.Choice(list(typing.get_args(hint)))
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    ends: dict[str, Any] = {"min": low, "max": high, "min_open": "gt" in bounds, "max_open": "lt" in bounds}
    if hint is int:
        return click.IntRange(**ends)
    return _Number(**ends) if hint is float else click.STRING


def reading(
    labels: str | None,
    mapping: Sequence[str],
    preprocess: pathlib.Path | None,
    limit: int | None,
    batch: int | None = None,
) -> DataOptions:
    """The options of `reading_options` and `data_options` as one value.

    Raises:
        DataError: a `--map` is not KEY=INPUT.
    """
    from onnxcompress.data.preprocess import Preprocess

    pairs: dict[str, str] = {}
    for entry in mapping:
        key, sign, name = entry.partition("=")
        if not (sign and key and name):
            raise DataError(f"--map {entry}: write KEY=INPUT")
        pairs[key] = name
    loaded = Preprocess.load(preprocess) if preprocess is not None else None
    return DataOptions(labels, pairs or None, loaded, batch, limit)


def select_of(include: Sequence[str], exclude: Sequence[str]) -> Select:
    """`--include` and `--exclude` as the recipe's `select`."""
    return Select(tuple(include), tuple(exclude))
