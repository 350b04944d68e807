"""Predictions on disk: what was answered and what was asked for, so that any score can be had without the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

    def numbers(self, scorer: str | None = None) -> np.ndarray:
        """Each row's numbers under `scorer` (by default the task's), shape (rows, k)."""
        return scorer_named(scorer or self.scorer).numbers(self.predictions, self.references, self.sources)

    def score(self, scorer: str | None = None) -> float:
        """The score under `scorer` (by default the task's)."""
        found = scorer_named(scorer or self.scorer)
        rows = self.numbers(scorer)
        return float(found.total(rows.sum(axis=0), len(rows)))

    def lines(self) -> list[dict[str, Any]]:
        """A mapping a row, as written to JSONL; `of` is the number of rows."""
        lines = []
        for i, (prediction, references, source) in enumerate(
            zip(self.predictions, self.references, self.sources, strict=True)
        ):
            line = {"task": self.task, "scorer": self.scorer, "row": i, "of": len(self.predictions)}
            line |= {"prediction": prediction, "references": list(references)}
            lines.append(line if source is None else {**line, "source": source})
        return lines


def read_predictions(path: str | Path) -> dict[str, Predictions]:
    """Task name -> its predictions, from a JSONL file.

    Raises:
        PmLlmError: If the file cannot be read.
        MissingPredictionError: If a row is missing or occurs twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return gather(json.loads(line) for line in text.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PmLlmError(f"{path} cannot be read as predictions: {error}") from error
    except MissingPredictionError as error:
        raise MissingPredictionError(f"{path}: {error}") from error


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
    missing = [i for i in range(first["of"]) if i not in rows]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise MissingPredictionError(
            f"{len(missing)} of {first['of']} predictions of task {name!r} are missing (row {shown}). Evaluate again."
        )
    lines = [rows[i] for i in range(first["of"])]
    return Predictions(
        name,
        first["scorer"],
        [line["prediction"] for line in lines],
        [line["references"] for line in lines],
        [line.get("source") for line in lines],
    )
