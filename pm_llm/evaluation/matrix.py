"""The accuracy matrix and what follows from it. A measurement that is missing is an error, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


class MissingScoreError(KeyError):
    """A number was asked for that was never measured."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Matrix:
    """`a[i][j]`: the score (0 to 100) on task j after training task i, both counted from 0 in `tasks`' order.

    Definitions as in GEM (Lopez-Paz and Ranzato, arXiv 1706.08840) and RWalk (Chaudhry et al., arXiv 1801.10112).
    """

    tasks: list[str]
    scores: dict[tuple[int, int], float] = field(default_factory=dict)

    def set(self, stage: int, task: str, score: float) -> None:
        """Note the score on `task` after training task number `stage`."""
        self.scores[stage, self.tasks.index(task)] = score

    def get(self, stage: int, j: int) -> float:
        """`a[stage][j]`. Raises MissingScoreError if it was not measured."""
        try:
            return self.scores[stage, j]
        except KeyError:
            raise MissingScoreError(
                f"the score on task {self.tasks[j]!r} after stage {stage + 1} was not measured."
            ) from None

    def average_accuracy(self, stage: int | None = None) -> float:
        """`AA_t = mean_{j<=t} a[t][j]`; by default after the last task."""
        stage = len(self.tasks) - 1 if stage is None else stage
        return fmean(self.get(stage, j) for j in range(stage + 1))

    def average_over_time(self) -> float:
        """`AAA = mean_t AA_t`."""
        return fmean(self.average_accuracy(t) for t in range(len(self.tasks)))

    def backward_transfer(self) -> float:
        """`BWT = mean_{j<T} (a[T][j] - a[j][j])`; needs two tasks."""
        last = self._last_of_several()
        return fmean(self.get(last, j) - self.get(j, j) for j in range(last))

    def forgetting(self) -> float:
        """`mean_{j<T} (max_{j<=i<T} a[i][j] - a[T][j])`; needs two tasks."""
        last = self._last_of_several()
        return fmean(max(self.get(i, j) for i in range(j, last)) - self.get(last, j) for j in range(last))

    def plasticity(self) -> float:
        """`mean_j a[j][j]`."""
        return fmean(self.get(j, j) for j in range(len(self.tasks)))

    def _last_of_several(self) -> int:
        if len(self.tasks) < 2:
            raise MissingScoreError("transfer and forgetting need at least two tasks.")
        return len(self.tasks) - 1

    def summary(self) -> dict[str, float]:
        """All of the above by name; transfer and forgetting only where there are two tasks."""
        numbers = {
            "average_accuracy": self.average_accuracy(),
            "average_over_time": self.average_over_time(),
            "plasticity": self.plasticity(),
        }
        if len(self.tasks) > 1:
            numbers["backward_transfer"] = self.backward_transfer()
            numbers["forgetting"] = self.forgetting()
        return numbers

    def rows(self) -> list[list[float | None]]:
        """The matrix as lists, None where nothing was measured."""
        n = len(self.tasks)
        return [[self.scores.get((i, j)) for j in range(n)] for i in range(n)]

    @classmethod
    def from_rows(cls, tasks: list[str], rows: list[list[float | None]]) -> Matrix:
        """The inverse of :meth:`rows`."""
        return cls(tasks, {(i, j): x for i, row in enumerate(rows) for j, x in enumerate(row) if x is not None})

    def table(self, coefficients: list[float] | None = None) -> str:
        """As a Markdown table, a row a stage, with the merge coefficients if given."""
        extra = ["coefficient"] if coefficients is not None else []
        lines = ["| after | " + " | ".join([*self.tasks, "average", *extra]) + " |"]
        lines.append("|---|" + "---:|" * (len(self.tasks) + 1 + len(extra)))
        for i, name in enumerate(self.tasks):
            if not any((i, j) in self.scores for j in range(i + 1)):
                continue
            cells = [_cell(self.scores.get((i, j))) for j in range(len(self.tasks))]
            whole = all((i, j) in self.scores for j in range(i + 1))
            cells.append(_cell(self.average_accuracy(i) if whole else None))
            if coefficients is not None:
                cells.append(f"{coefficients[i]:.3f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"
