"""The accuracy matrix and what follows from it. A measurement that is missing is an error, never 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.run.record import Results

UNTRAINED = -1  # the stage before the first task
# what can be said where only so much was measured (`evaluate`)
NUMBERS = {
    "final": ("average_accuracy",),
    "diagonal+final": ("average_accuracy", "plasticity", "backward_transfer"),
    "seen": ("average_accuracy", "average_over_time", "plasticity", "backward_transfer", "forgetting"),
    "all": (
        *("average_accuracy", "average_over_time", "plasticity", "backward_transfer", "forgetting"),
        "forward_transfer",
    ),
}
WITHOUT_ROWS = ("plasticity", "forward_transfer")  # what needs no score of a task after its own stage
NEED_TWO = ("backward_transfer", "forgetting", "forward_transfer")


class MissingScoreError(KeyError):
    """A number was asked for that was never measured."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Matrix:
    """`a[i][j]`: the score on task j after stage i, both counted from 0; stage -1 is the untrained model.

    Definitions as in GEM (Lopez-Paz and Ranzato, arXiv 1706.08840) and RWalk (Chaudhry et al., arXiv 1801.10112),
    where stage i trains task i. In a recurring sequence a task counts as learned at its last stage so far.

    Args:
        tasks: The distinct tasks, a column each.
        scores: (stage, column) -> score.
        stages: The task trained at each stage; by default `tasks`.
        lower_is_better: For perplexity: the best earlier score is then the lowest.
        aside: Tasks that no average is of: those better low, where other scores are better high.
        lower: The columns of which a lower score is better; by default all with `lower_is_better`, else none.
    """

    tasks: list[str]
    scores: dict[tuple[int, int], float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    lower_is_better: bool = False
    aside: frozenset[str] = frozenset()
    lower: frozenset[str] | None = None

    def __post_init__(self) -> None:
        self.stages = self.stages or list(self.tasks)

    def set(self, stage: int, task: str, score: float) -> None:
        """Note the score on `task` after stage number `stage`."""
        self.scores[stage, self.tasks.index(task)] = score

    def get(self, stage: int, j: int) -> float:
        """`a[stage][j]`. Raises MissingScoreError if it was not measured."""
        try:
            return self.scores[stage, j]
        except KeyError:
            when = "before training" if stage == UNTRAINED else f"after stage {stage + 1}"
            raise MissingScoreError(f"the score on task {self.tasks[j]!r} {when} was not measured.") from None

    def learned(self, stage: int) -> dict[int, int]:
        """Column -> its last training stage, of the tasks trained by `stage` that averages are of."""
        return {self.tasks.index(name): i for i, name in enumerate(self.stages[: stage + 1]) if name not in self.aside}

    def average_accuracy(self, stage: int | None = None) -> float:
        """`AA_t = mean_{j<=t} a[t][j]`; by default after the last task."""
        stage = len(self.stages) - 1 if stage is None else stage
        return fmean(self.get(stage, j) for j in self.learned(stage))

    def average_over_time(self) -> float:
        """`AAA = mean_t AA_t`."""
        return fmean(self.average_accuracy(t) for t in range(len(self.stages)) if self.learned(t))

    def backward_transfer(self) -> float:
        """`BWT = mean_{j<T} (a[T][j] - a[j][j])`; needs two tasks."""
        last = self._last_of_several()
        return fmean(self.get(last, j) - self.get(i, j) for j, i in self.learned(last).items() if i < last)

    def forgetting(self) -> float:
        """`mean_{j<T} (max_{j<=i<T} a[i][j] - a[T][j])`; needs two tasks.

        What a task scored before it was trained does not count, so that the number is the same for `seen` and `all`.
        """
        last, best = self._last_of_several(), min if self.lower_is_better else max
        gaps = []
        for j, i in self.learned(last).items():
            if i < last:
                gaps.append(best(self.get(k, j) for k in range(i, last)) - self.get(last, j))
        return -fmean(gaps) if self.lower_is_better else fmean(gaps)

    def forward_transfer(self) -> float:
        """`FWT = mean_{j>1} (a[j-1][j] - b[j])`, `b` the untrained model's scores; needs two tasks."""
        self._last_of_several()
        first = {name: self.stages.index(name) for name in self.stages}
        return fmean(
            self.get(i - 1, self.tasks.index(name)) - self.get(UNTRAINED, self.tasks.index(name))
            for name, i in first.items()
            if i > 0 and name not in self.aside
        )

    def plasticity(self) -> float:
        """`mean_j a[j][j]`."""
        own = [(i, name) for i, name in enumerate(self.stages) if name not in self.aside]
        return fmean(self.get(i, self.tasks.index(name)) for i, name in own)

    def fuar(self, kept: Sequence[str], updated: str, acquired: str) -> float | None:
        """Forgotten / (Updated + Acquired) Ratio of continual knowledge learning (Jang et al., arXiv 2110.03215).

        With corpora D_0 (the untrained model's) to D_n (the last stage's), `kept[i]` measures invariant knowledge of
        D_i, `updated` and `acquired` knowledge that D_n changes and brings:
        `sum_i max(0, a[D_i][kept_i] - a[D_n][kept_i])` over
        `sum_i max(0, a[D_n][updated] - a[D_i][updated]) + max(0, a[D_n][acquired] - a[D_i][acquired])`.

        Args:
            kept: A task for each of D_0 ... D_{n-1}; the same one may occur several times.

        Returns:
            The ratio (below 1: more gained than forgotten), or None where nothing was gained.
        """
        self.check_fuar(kept, updated, acquired)
        last = len(self.stages) - 1

        def gap(task: str, a: int, b: int) -> float:
            j, low = self.tasks.index(task), self.lower_is_better if self.lower is None else task in self.lower
            sign = -1 if low else 1
            return max(0.0, sign * (self.get(a, j) - self.get(b, j)))

        before = range(UNTRAINED, last)
        forgotten = sum(gap(task, i, last) for i, task in zip(before, kept, strict=True))
        gained = sum(gap(task, last, i) for i in before for task in (updated, acquired))
        return forgotten / gained if gained > 0 else None

    def check_fuar(self, kept: Sequence[str], updated: str, acquired: str) -> None:
        """Raises PmLlmError if these cannot be the tasks of :meth:`fuar`."""
        for task in (*kept, updated, acquired):
            if task not in self.tasks:
                raise unknown_name("task of fuar", str(task), self.tasks)
        if len(kept) != len(self.stages):
            raise PmLlmError(
                f"fuar needs a kept task for each of {len(self.stages)} states before the last; {len(kept)} given."
            )

    def _last_of_several(self) -> int:
        if len({*self.stages} - self.aside) < 2:
            raise MissingScoreError("transfer and forgetting need at least two tasks.")
        return len(self.stages) - 1

    def summary(self, evaluate: str = "seen", keep: bool = True) -> dict[str, float]:
        """The numbers that `evaluate` (seen, final, diagonal+final, all) measures, by name; some need two tasks.

        Args:
            evaluate: What was scored.
            keep: Whether test rows of finished tasks were kept; else nothing is known of a task after its own stage.

        Raises:
            MissingScoreError: If one of their scores was not measured.
        """
        several = len({*self.stages} - self.aside) > 1
        names = [name for name in NUMBERS[scored_as(evaluate, keep)] if keep or name in WITHOUT_ROWS]
        return {name: getattr(self, name)() for name in names if several or name not in NEED_TWO}

    def with_task_known(self, evaluate: str = "seen", keep: bool = True) -> dict[str, float]:
        """The same where each task is answered by the model of its own (last) stage, if that is measured."""
        if scored_as(evaluate, keep) == "final":
            return {}
        own = self.learned(len(self.stages) - 1).items()
        return {"average_accuracy": fmean(self.get(i, j) for j, i in own), "plasticity": self.plasticity()}

    def rows(self) -> list[list[float | None]]:
        """The matrix as lists, a row a stage, None where nothing was measured."""
        return [[self.scores.get((i, j)) for j in range(len(self.tasks))] for i in range(len(self.stages))]

    @classmethod
    def from_rows(cls, tasks: list[str], rows: list[list[float | None]], stages: Sequence[str] = ()) -> Matrix:
        """The inverse of :meth:`rows`."""
        scores = {(i, j): x for i, row in enumerate(rows) for j, x in enumerate(row) if x is not None}
        return cls(tasks, scores, list(stages))

    @classmethod
    def from_results(cls, results: Results) -> Matrix:
        """The matrix of a run's results."""
        matrix = cls.from_rows(results.tasks, results.matrix, results.stages)
        matrix.lower_is_better, matrix.aside = results.lower_is_better, frozenset(results.aside)
        if results.scorers:
            matrix.lower = lower_of(results.tasks, results.scorers)
        for name, value in (results.untrained or {}).items():
            matrix.set(UNTRAINED, name, value)
        return matrix

    def table(self, coefficients: list[float] | None = None) -> str:
        """As a Markdown table, a row a stage, with the merge coefficients if given."""
        extra = ["coefficient"] if coefficients is not None else []
        lines = ["| after | " + " | ".join([*self.tasks, "average", *extra]) + " |"]
        lines.append("|---|" + "---:|" * (len(self.tasks) + 1 + len(extra)))
        for i, name, scores, average in self.lines():
            shown = [cell(x) for x in (*scores, average)]
            if coefficients is not None:
                shown.append("" if i == UNTRAINED else f"{coefficients[i]:.3f}")
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        return "\n".join(lines)

    def lines(self) -> Iterator[tuple[int, str, list[float | None], float | None]]:
        """Of each stage at which something was scored: its number and name, a score a task, and their average where
        all tasks learnt by then were scored."""
        for i, name in {UNTRAINED: "(untrained)", **dict(enumerate(self.stages))}.items():
            scores = [self.scores.get((i, j)) for j in range(len(self.tasks))]
            if all(x is None for x in scores):
                continue
            whole = i != UNTRAINED and bool(self.learned(i)) and all(scores[j] is not None for j in self.learned(i))
            yield i, name, scores, self.average_accuracy(i) if whole else None

    def since_learnt(self, stage: int) -> dict[int, tuple[float, float]]:
        """Column -> its score when it was learnt and at `stage`, of the tasks of which both were measured."""
        learned = self.learned(stage) if stage != UNTRAINED else {}
        known = {j: i for j, i in learned.items() if {(i, j), (stage, j)} <= self.scores.keys()}
        return {j: (self.scores[i, j], self.scores[stage, j]) for j, i in known.items()}


def lower_of(tasks: Sequence[str], scorers: Sequence[str]) -> frozenset[str]:
    """The tasks of which a lower score is better."""
    from pm_llm.evaluation.scorers import SCORERS

    return frozenset(name for name, scorer in zip(tasks, scorers, strict=True) if SCORERS[scorer].lower_is_better)


def scored_as(evaluate: str, keep: bool) -> str:
    """What `evaluate` comes to: without kept test rows (`keep`) a task is scored after its own stage, or never."""
    return "diagonal+final" if evaluate == "final" and not keep else evaluate


def gap_closed(method: float, seqlora: float, joint: float) -> float:
    """`(method - seqlora) / (joint - seqlora)` of final averages: 0 is plain sequential fine-tuning, 1 joint training.

    Raises:
        PmLlmError: If `joint` and `seqlora` are equal: there is no gap.
    """
    if joint == seqlora:
        raise PmLlmError(f"joint and seqlora both score {joint}: there is no gap to close.")
    return (method - seqlora) / (joint - seqlora)


def cell(value: float | None) -> str:
    """A score as it is shown; empty where there is none."""
    return "" if value is None else f"{value:.1f}"
