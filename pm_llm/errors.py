"""Errors that are the user's to mend: one clear line, no traceback on the command line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from math import inf, isfinite
from pathlib import Path
from typing import Any


class PmLlmError(ValueError):
    """Bad input. The message says what was given, what is allowed and what to do; `status` is the exit status."""

    status = 2


class NonFiniteLossError(PmLlmError):
    """The training loss became NaN or infinite; the running adapter has not been touched."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_number(
    what: str,
    value: Any,
    low: float = -inf,
    high: float = inf,
    whole: bool = False,
    above: float = -inf,
    below: float = inf,
) -> None:
    """Raise PmLlmError unless the value is a finite number (a whole one) from `low` to `high`, above `above` and below
    `below`.

    Args:
        what: Where it stands and its name, such as `perturb: epsilon`.
        value: What was given.
        low: The smallest allowed.
        high: The largest allowed.
        whole: Whether it must be an integer.
        above: What it must be larger than.
        below: What it must be smaller than.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not isfinite(value):
        good = False
    else:
        good = low <= value <= high and above < value < below
    if not good:
        bounds = [f"{word} {x}" for word, x in (("from", low), ("above", above)) if x > -inf]
        bounds += [f"{word} {x}" for word, x in (("to", high), ("to below", below)) if x < inf]
        kind = "a whole number" if whole else "a finite number"
        raise PmLlmError(f"{what} is {value!r}; it must be {' '.join([kind, *bounds])}.")


def check_pattern(what: str, pattern: str) -> None:
    """Raise PmLlmError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise PmLlmError(f"{what}: {pattern!r} is no pattern: {error}.") from error


@lru_cache  # the same may be asked of every row of a file
def did_you_mean(given: str, names: tuple[str, ...]) -> str:
    """A question with the name that is nearest to what was given; "" where none is near."""
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def near_file(path: Path) -> str:
    """The same for a file or folder that is not there: with the nearest name beside it."""
    beside = tuple(sorted(one.name for one in path.parent.iterdir())) if path.parent.is_dir() else ()
    return did_you_mean(path.name, beside)


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> PmLlmError:
    """The error for a name that is not among `allowed`, with the nearest one that is."""
    names = tuple(sorted(allowed))
    return PmLlmError(f"unknown {kind} {given!r}.{did_you_mean(given, names)} Allowed: {', '.join(names)}.")


def nobody_listens() -> None:
    """Let what is printed from now on go nowhere: the pipe it went to is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
