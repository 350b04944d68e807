"""Values from YAML and the command line as the types that are wanted."""

from __future__ import annotations

import re
import types
import typing
from math import isfinite
from typing import Any

from pm_llm.errors import PmLlmError

NAMES: dict[Any, str] = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    type(None): "none",
}


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def exponents(value: Any) -> Any:
    """The same with each text like `1e-6`, which YAML 1.1 does not take for a number, as the number; also inside."""
    if isinstance(value, dict):
        return {key: exponents(x) for key, x in value.items()}
    if isinstance(value, list):
        return [exponents(x) for x in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def extra_value(value: Any, hint: Any, key: str) -> Any:
    """`value` for a field of another library: converted if plain, with :func:`exponents` if a mapping, or as it is.

    Raises:
        PmLlmError: If the field is of plain types and `value` of none of them.
    """
    kinds = {typing.get_origin(one) or one for one in typing.get_args(hint) or (hint,)}
    switch = isinstance(value, bool) and str in kinds  # `fsdp: true` is meant, though a text is annotated
    if kinds <= {bool, int, float, str, type(None)} and not switch:
        return convert(value, hint, key)
    return exponents(value) if dict in kinds else value


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; an int is a float too, and YAML's `1e-3` (a string to YAML 1.1) is a number.

    Raises:
        PmLlmError: If it is of no type that `hint` allows; `key` is what it is called.
    """
    if hint is Any:
        return value
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for one in options:
        plain = typing.get_origin(one) or one
        if plain is float and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if not isfinite(number):
                continue
            return number
        if plain is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            inner = typing.get_args(one)
            if plain is list and inner:
                return [convert(x, inner[0], f"{key}: element {i}") for i, x in enumerate(value, start=1)]
            if plain is dict and inner:
                return {
                    convert(name, inner[0], f"{key}: key"): convert(x, inner[1], f"{key}: {name!r}")
                    for name, x in value.items()
                }
            return value
    names = " or ".join(NAMES.get(typing.get_origin(one) or one, str(one)) for one in options)
    raise PmLlmError(f"{key} is {value!r}; it must be {names}.")
