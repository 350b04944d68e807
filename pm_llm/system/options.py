"""Options as dataclass fields: default, help and what they may be stand in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from math import inf
from typing import Any

from pm_llm.errors import PmLlmError, check_number

BOUNDS = {"least", "above", "most", "below", "finite"}


def option(default: Any, help: str = "", **bounds: Any) -> Any:
    """A dataclass field; lists and mappings get a fresh copy each.

    Args:
        default: Its default.
        help: What it is, for `--help`.
        bounds: What it may be: `choices` (a tuple), or `least`, `above` (it must be larger), `most`, `below` (it must
            be smaller), `finite`. A field annotated `int` takes whole numbers only. None is not looked at.
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(section: Any, prefix: str = "") -> None:
    """Raise PmLlmError if a field of a dataclass, or of those in it, is not what it may be."""
    for f in dataclasses.fields(section):
        value, bounds = getattr(section, f.name), f.metadata
        if dataclasses.is_dataclass(value):
            check_options(value, f"{prefix}{f.name}.")
        elif "choices" in bounds and value not in bounds["choices"]:
            raise PmLlmError(f"{prefix}{f.name} is {value!r}; it must be {' or '.join(map(str, bounds['choices']))}.")
        elif value is not None and BOUNDS & bounds.keys():
            check_number(
                f"{prefix}{f.name}",
                value,
                bounds.get("least", -inf),
                bounds.get("most", inf),
                whole="int" in str(f.type).split(" | "),
                above=bounds.get("above", -inf),
                below=bounds.get("below", inf),
            )
