"""Options as dataclass fields: default, help and what they may be stand in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from math import inf, isfinite
from typing import Any

from pm_llm.errors import PmLlmError

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
            whole = "int" in str(f.type).split(" | ")
            if not _is_within(value, whole, bounds):
                raise PmLlmError(f"{prefix}{f.name} is {value!r}; it must be {_said(whole, bounds)}.")


def _is_within(value: Any, whole: bool, bounds: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not isfinite(value):
        return False
    closed = bounds.get("least", -inf) <= value <= bounds.get("most", inf)
    return bool(closed and bounds.get("above", -inf) < value < bounds.get("below", inf))


def _said(whole: bool, bounds: Any) -> str:
    words = {"least": "from {}", "above": "above {}", "most": "to {}", "below": "to below {}"}
    found = [words[key].format(bounds[key]) for key in ("least", "above", "most", "below") if key in bounds]
    return " ".join(["a whole number" if whole else "a finite number", *found])
