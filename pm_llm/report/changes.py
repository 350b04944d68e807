"""What became of each ability and each task: its score when it was as it should be, and now, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval, paired_difference
from pm_llm.evaluation.matrix import UNTRAINED
from pm_llm.evaluation.predictions import Predictions
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.report.data import Run
from pm_llm.report.gate import MEAN, Course, mean_score
from pm_llm.report.tables import markdown

HEADER = ["", "since", "then", "now", "change (95 %)", "rows right to wrong", "wrong to right"]
SHIFTS = {
    "kl_from_base": "KL from the base, nats a token",
    "update_norm": "norm of the update",
    "adapter_norm": "of the adapter",
}


@dataclass(frozen=True)
class Change:
    """Of one column: `then` is its score before training (a probe) or after its own stage, `now` that after the last
    one; `path` what was won since then after each later stage that it was scored after, paired by rows (None: the rows
    are not told apart); `lost` and `won` are the numbers of the rows that went from right to wrong and from wrong to
    right (None: its rows are not right or wrong)."""

    name: str
    since: str
    then: float
    now: float
    path: dict[str, Interval | None]
    lost: list[int] | None = None
    won: list[int] | None = None

    @property
    def gap(self) -> Interval | None:
        """What was won by the last stage."""
        return [*self.path.values()][-1]

    def cells(self) -> list[str]:
        """For a table."""
        rows = ["" if some is None else str(len(some)) for some in (self.lost, self.won)]
        return [self.name, self.since, f"{self.then:.1f}", f"{self.now:.1f}", _shown(self.gap), *rows]

    def renamed(self, shown: Callable[[str], str]) -> Change:
        """With names as `shown` has them."""
        path = {shown(name): gap for name, gap in self.path.items()}
        return replace(self, name=shown(self.name), since=shown(self.since), path=path)


def changes(run: Run) -> list[Change]:
    """Of every probe that was scored before training, and every task but the last; with general abilities also their
    mean, without perplexities. Use :attr:`pm_llm.report.data.Run.changes`, which keeps them."""
    if run.results.facts.knows_task:
        return []
    course, last = Course(run.path, run.matrix.stages, run.predictions), len(run.matrix.stages) - 1
    scored = [
        (name, i)
        for name, i in course.guarded.items()
        if name in run.predictions[last] and name in run.predictions.get(i, {})
    ]
    found = [_change(run, [name], i) for name, i in scored]
    return found + [_change(run, names, UNTRAINED) for names in course.columns if len(names) > 1]


def _change(run: Run, names: list[str], stage: int) -> Change:
    """Of a column, or of several together, since a stage."""
    stages = run.matrix.stages
    labels = [task if stages.count(task) == 1 else f"{task} ({i})" for i, task in enumerate(stages, start=1)]
    then, now = ([run.predictions[i][name] for name in names] for i in (stage, len(stages) - 1))
    path = {
        labels[i]: _paired([run.predictions[i][name] for name in names], then)
        for i in range(stage + 1, len(stages))
        if all(name in run.predictions.get(i, {}) for name in names)
    }
    since = "before training" if stage == UNTRAINED else f"after {names[0]}"
    shown, rows = (names[0], changed_rows(then[0], now[0])) if len(names) == 1 else (MEAN, (None, None))
    return Change(shown, since, mean_score(then), mean_score(now), path, *rows)


def changed_rows(before: Predictions, after: Predictions) -> tuple[list[int], list[int]] | tuple[None, None]:
    """The numbers of the rows that went from right to wrong, and from wrong to right."""
    if not scorer_named(after.scorer).by_row or len(before.predictions) != len(after.predictions):
        return None, None
    then, now = (one.numbers[:, 0] > 50 for one in (before, after))
    lost, won = ([int(i) for i in some.nonzero()[0]] for some in (then & ~now, ~then & now))
    return lost, won


def _paired(now: Sequence[Predictions], then: Sequence[Predictions]) -> Interval | None:
    try:
        return paired_difference(now, then)
    except PmLlmError:  # of a version that did not tell rows apart, or other rows: there is no interval to give
        return None


def _shown(gap: Interval | None) -> str:
    return "" if gap is None else f"{gap.value:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"


def path_cells(found: Sequence[Change]) -> list[list[str]]:
    """A header, and a row for each that was scored before training: what changed since then, after each stage."""
    several = [one for one in found if one.since == "before training" and len(one.path) > 1]
    names = list(dict.fromkeys(name for one in several for name in one.path))
    rows = [[one.name, *(_shown(one.path.get(name)) for name in names)] for one in several]
    return [["change since before training", *(f"after {name}" for name in names)], *rows] if rows else []


def kept_table(found: Sequence[Change]) -> str:
    """As Markdown; empty where there is none."""
    tables = [[HEADER, *(one.cells() for one in found)] if found else [], path_cells(found)]
    return "\n\n".join(markdown(header, rows) for header, *rows in filter(None, tables))


def shift_cells(run: Run) -> list[list[str]]:
    """A row a stage: how far it went from the base; those that did not measure it are left out."""
    return [
        [task, *("" if shift[key] is None else f"{shift[key]:.3g}" for key in SHIFTS)]
        for task, shift in zip(run.results.stages, run.results.shifts, strict=False)
        if shift
    ]


def shifts(run: Run) -> str:
    """The same as Markdown; empty where no stage measured it."""
    rows = shift_cells(run)
    return markdown(["after", *SHIFTS.values()], rows) if rows else ""


def wrong_answers(run: Run, most: int = 3, length: int = 300) -> list[list[str]]:
    """Rows of a table: of each task's answers after the last stage, those that are furthest from right; none of a
    task whose answers are no texts, or whose predictions hold no prompts."""
    found = []
    for name, said in run.predictions.get(len(run.matrix.stages) - 1, {}).items():
        scorer = scorer_named(said.scorer)
        if (
            not scorer.by_row
            or scorer.lower_is_better
            or not said.prompts
            or not all(isinstance(x, str) for x in said.predictions)
        ):
            continue
        scores = said.numbers[:, 0]
        worst = [int(i) for i in scores.argsort(kind="stable")[:most] if scores[i] < scores.max(initial=50.0)]
        for i in worst:
            texts = (said.prompts[i], said.predictions[i], str(said.references[i][0]))
            found.append([f"{name}, {i}", *(x if len(x) <= length else f"{x[:length]} ..." for x in texts)])
    return found
