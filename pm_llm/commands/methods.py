"""The table of methods, made from the registry, the classes behind it and what the tests run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.methods import REGISTRIES, Choice, Method
from pm_llm.presets import PRESETS, TESTED
from pm_llm.report.tables import words


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("methods", help="list every preset, start, constraint and merge")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm methods`: the table of presets, then what they are made of."""
    print(f"{table()}\n{choices()}")
    return 0


HEADER = ("preset", "start", "constrain", "merge", "source", "needs", "keeps from task to task", "tested on")


def table() -> str:
    """A Markdown table, a row a preset."""
    rows = [HEADER, ["---"] * len(HEADER), *(_row(name, method) for name, method in PRESETS.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(name: str, method: Method) -> list[str]:
    start, merge = method.start.build("start"), method.merge.build("merge")
    constraints = [choice.build("constrain") for choice in method.constrain]
    keeps = ["the last adapter"] if start.begins == "last" else []
    keeps += [one.stores for one in constraints if one.stores] + ([merge.stores] if merge.stores else [])
    needs = ["old data"] if method.says("old_data") else []
    needs += ["old adapters"] if merge.old_adapters else []
    needs += ["a task id"] if method.task_id else []
    return [
        f"`{name}`",
        words(method.start.plain()),
        words([choice.plain() for choice in method.constrain]),
        words(method.merge.plain()),
        method.source,
        ", ".join(needs) or "-",
        ", ".join(keeps) or "-",
        ", ".join(kind for kind, presets in TESTED.items() if name in presets),
    ]


def choices() -> str:
    """Every start, constraint and merge with the first line of its docstring, and its options with their defaults."""
    lines = []
    for kind, registry in REGISTRIES.items():
        lines += [f"\n{kind}:"]
        for name, place in registry.items():
            try:
                factory = Choice(name).factory(kind)
            except PmLlmError:  # of another package
                lines.append(f"- `{name}`: cannot be loaded from {place}")
                continue
            text = (importlib.import_module(place.partition(":")[0]).__doc__ or "").partition("\n")[0]
            options = [_option(f) for f in dataclasses.fields(factory) if f.init]
            given = f" Options: {', '.join(options)}." if options else ""
            lines.append(f"- `{name}`: {text.partition(': ')[2]}{given}")
    return "\n".join(lines)


def _option(field: dataclasses.Field[Any]) -> str:
    """Its name and its default, as it is shown."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        shown = str(value).lower()
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value) or "(required)"
    return f"{field.name} {shown}"
