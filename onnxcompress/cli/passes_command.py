"""`onnxcompress passes`."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options
from onnxcompress.cli.report import Report
from onnxcompress.contract import Select
from onnxcompress.errors import RecipeError
from onnxcompress.recipe import built_in


@click.command("passes")
@options.common_options
def command(json_file: pathlib.Path | None, quiet: bool, verbose: bool, **_: Any) -> int:
    """Every installed pass, its parameters and defaults, and the built-in recipes."""
    report = Report(json_file, quiet, verbose)
    report.check()
    found = [_describe(name) for name in registry.names()]
    recipes = built_in()
    report.write({"schema": 1, "passes": found, "recipes": recipes})
    for entry in found:
        report.say(f"{entry['name']}: {entry['error'] or entry['summary']}")
        for p in entry["parameters"]:
            report.say(f"    {p['name']}: {p['type']} = {_shown(p['default'])}    {p['doc']}{p['bounds']}")
    report.say("recipes:")
    for name, words in recipes.items():
        report.say(f"    {name}: {words}")
    return 0


def _describe(name: str) -> dict[str, Any]:
    """A pass as it is listed; `error` for one that cannot be loaded, which must not hide the others."""
    try:
        kind = registry.load(name)
    except RecipeError as error:
        return {"name": name, "summary": "", "parameters": [], "error": str(error)}
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    listed = [_parameter(field) for field in dataclasses.fields(kind)]
    return {"name": name, "summary": summary, "parameters": listed, "error": None}


def _shown(default: Any) -> str:
    return "none" if default in ("", "()", None) else str(default)


def _parameter(field: dataclasses.Field[Any]) -> dict[str, Any]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = ", ".join(f"{sign} {field.metadata[key]}" for key, sign in signs.items() if key in field.metadata)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, Select):
        default = "everything"
    elif not isinstance(default, str | int | float | bool | None):
        default = repr(default)
    return {
        "name": field.name,
        "type": str(field.type),
        "default": default,
        "doc": field.metadata.get("doc", ""),
        "bounds": f" ({bounds})" if bounds else "",
    }
