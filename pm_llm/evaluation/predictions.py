"""Predictions on disk: what was answered and what was asked for, so that any score can be had without the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.scorers import scorer_named


class MissingPredictionError(PmLlmError):
    """A set of predictions lacks a row, so that its score would be that of other rows."""


@dataclass(frozen=True)
class Predictions:
    """All predictions on one task's test rows, in the rows' order."""

    task: str
    scorer: str
    predictions: Sequence[Any]
    references: Sequence[Sequence[Any]]
    sources: Sequence[str | None]
    keys: Sequence[str] = ()  # what tells rows apart: a digest of prompt and answer
    prompts: Sequence[str] = ()  # as the rows hold them: before any shortening, without the chat template
    places: Sequence[str] = ()  # where the rows stand: `file:line`, or ""

    @cached_property
    def numbers(self) -> np.ndarray:
        """Each row's numbers under the task's scorer, shape (rows, k)."""
        return scorer_named(self.scorer).numbers(self.predictions, self.references, self.sources)

    def score(self, scorer: str | None = None) -> float:
        """The score under `scorer` (by default the task's)."""
        one = self if scorer is None else replace(self, scorer=scorer)
        return scorer_named(one.scorer).of(one.numbers)

    def lines(self) -> list[dict[str, Any]]:
        """A mapping a row, as written to JSONL; `of` is the number of rows."""
        lines = []
        for i, (prediction, references, source) in enumerate(
            zip(self.predictions, self.references, self.sources, strict=True)
        ):
            line = {"task": self.task, "scorer": self.scorer, "row": i, "of": len(self.predictions)}
            line |= {"prediction": prediction, "references": list(references)}
            line |= {"key": self.keys[i]} if self.keys else {}
            line |= {"prompt": self.prompts[i], "place": self.places[i]} if self.prompts else {}
            lines.append(line if source is None else {**line, "source": source})
        return lines


def read_predictions(path: str | Path) -> dict[str, Predictions]:
    """Task name -> its predictions, from a JSONL file.

    Raises:
        PmLlmError: If the file cannot be read.
        MissingPredictionError: If a row is missing or occurs twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        # not splitlines(): it also splits at characters that may stand in an answer
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not lines:
            raise PmLlmError("it holds none; nothing was scored at that stage")
        return gather(lines)
    except MissingPredictionError as error:
        raise MissingPredictionError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PmLlmError(f"{path} cannot be read as predictions: {said}.") from error


def read_all(paths: Iterable[str | Path]) -> dict[str, Predictions]:
    """Task name -> its predictions, from files of different tasks."""
    return {name: found for path in paths for name, found in read_predictions(path).items()}


def gather(lines: Iterable[dict[str, Any]]) -> dict[str, Predictions]:
    """Task name -> its predictions. Raises MissingPredictionError if a row is missing or occurs twice."""
    tasks: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        rows = tasks.setdefault(line["task"], {})
        if line["row"] in rows:
            raise MissingPredictionError(f"row {line['row']} of task {line['task']!r} occurs twice.")
        rows[line["row"]] = line
    return {name: _whole(name, rows) for name, rows in tasks.items()}


def _whole(name: str, rows: dict[int, dict[str, Any]]) -> Predictions:
    first = next(iter(rows.values()))
    if not isinstance(first["of"], int) or isinstance(first["of"], bool) or first["of"] < 1:
        raise PmLlmError(f"`of` of task {name!r} is {first['of']!r}; it must be the number of its rows")
    missing = list(islice((i for i in range(first["of"]) if i not in rows), 11))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise MissingPredictionError(
            f"{first['of'] - sum(i in range(first['of']) for i in rows)} of {first['of']} predictions of task "
            f"{name!r} are missing (row {shown}). Evaluate again."
        )
    if len(rows) > first["of"] or {(row["of"], row["scorer"]) for row in rows.values()} != {
        (first["of"], first["scorer"])
    }:
        raise PmLlmError(f"rows of task {name!r} do not belong to one evaluation")
    lines = [rows[i] for i in range(first["of"])]
    for i, line in enumerate(lines):
        if not isinstance(line["references"], list) or not line["references"]:
            raise PmLlmError(f"row {i} of task {name!r} has no list of references")
    return Predictions(
        name,
        first["scorer"],
        [line["prediction"] for line in lines],
        [line["references"] for line in lines],
        [line.get("source") for line in lines],
        *([line[name] for line in lines if name in line] for name in ("key", "prompt", "place")),
    )
