"""What became of each ability and each task: its score when it was as it should be, and now, on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval, paired_difference
from pm_llm.evaluation.matrix import UNTRAINED
from pm_llm.evaluation.plan import is_general
from pm_llm.evaluation.predictions import Predictions
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.report.data import Run
from pm_llm.report.gate import MEAN


@dataclass(frozen=True)
class Change:
    """Of one column: `then` is its score before training (a probe) or after its own stage, `now` that after the last
    one, `gap` now minus then, paired by rows (None: the rows are not told apart); `lost` and `won` are the numbers of
    the rows that went from right to wrong and from wrong to right (None: its rows are not right or wrong); `path` is
    the gap after each stage that it was scored after, for what was scored before training."""

    name: str
    since: str
    then: float
    now: float
    gap: Interval | None
    lost: list[int] | None = None
    won: list[int] | None = None
    path: dict[str, Interval | None] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """For a table."""
        rows = ["" if some is None else str(len(some)) for some in (self.lost, self.won)]
        return [self.name, self.since, f"{self.then:.1f}", f"{self.now:.1f}", _shown(self.gap), *rows]

    def renamed(self, shown: Callable[[str], str]) -> Change:
        """With names as `shown` has them."""
        return replace(
            self, name=shown(self.name), since=shown(self.since), path={shown(k): x for k, x in self.path.items()}
        )


HEADER = ["", "since", "then", "now", "change (95 %)", "rows right to wrong", "wrong to right"]


def changes(run: Run) -> list[Change]:
    """Of every probe that was scored before training, and every task but the last; with general abilities also their
    mean, without perplexities."""
    if run.results.facts.knows_task:
        return []
    last, own = len(run.matrix.stages) - 1, {name: i for i, name in enumerate(run.matrix.stages)}
    found, pairs = [], []
    for name, after in run.predictions[last].items():
        stage = own.get(name, UNTRAINED)
        before = run.predictions.get(stage, {}).get(name)
        if stage == last or before is None:
            continue
        since = "before training" if stage == UNTRAINED else f"after {name}"
        path = _path(run, [name]) if stage == UNTRAINED else {}
        found.append(replace(_change(name, since, before, after), path=path))
        if is_general(name) and not scorer_named(after.scorer).lower_is_better:
            pairs.append((after, before))
    if len(pairs) > 1:
        now, then = ([x[i] for x in pairs] for i in (0, 1))
        a, b = (sum(x.score() for x in some) / len(some) for some in (then, now))
        path = _path(run, [one.task for one in now])
        found.append(Change(MEAN, "before training", a, b, _paired(now, then), path=path))
    return found


def _path(run: Run, names: list[str]) -> dict[str, Interval | None]:
    """Task of each stage -> what was lost and won since before training, where all of them were scored."""
    then = [run.predictions[UNTRAINED][name] for name in names]
    stages = run.matrix.stages
    labels = [task if stages.count(task) == 1 else f"{task} ({i})" for i, task in enumerate(stages, start=1)]
    return {
        labels[i]: _paired([run.predictions[i][name] for name in names], then)
        for i in range(len(stages))
        if all(name in run.predictions.get(i, {}) for name in names)
    }


def _shown(gap: Interval | None) -> str:
    return "" if gap is None else f"{gap.value:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"


def path_cells(found: list[Change]) -> list[list[str]]:
    """A header, and a row for each that was scored before training: what changed since then, after each stage."""
    several = [one for one in found if len(one.path) > 1]
    names = list(dict.fromkeys(name for one in several for name in one.path))
    rows = [[one.name, *(_shown(one.path.get(name)) for name in names)] for one in several]
    return [["change since before training", *(f"after {name}" for name in names)], *rows] if rows else []


def _change(name: str, since: str, before: Predictions, after: Predictions) -> Change:
    lost = won = None
    if scorer_named(after.scorer).by_row and len(before.predictions) == len(after.predictions):
        then, now = (one.numbers[:, 0] > 50 for one in (before, after))
        lost, won = ([int(i) for i in some.nonzero()[0]] for some in (then & ~now, ~then & now))
    return Change(name, since, before.score(), after.score(), _paired([after], [before]), lost, won)


def _paired(now: list[Predictions], then: list[Predictions]) -> Interval | None:
    try:
        return paired_difference(now, then)
    except PmLlmError:  # of a version that did not tell rows apart, or other rows: there is no interval to give
        return None


def kept_table(found: list[Change]) -> str:
    """As Markdown; empty where there is none."""
    if not found:
        return ""
    tables = [[HEADER, *(one.cells() for one in found)], path_cells(found)]
    return "\n\n".join(map(_markdown, filter(None, tables)))


def _markdown(cells: list[list[str]]) -> str:
    header, *rows = cells
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shifts(run: Run) -> str:
    """How far each stage went from the base, as Markdown; empty where that was not measured."""
    rows = list(zip(run.matrix.stages, run.results.shifts, strict=False))
    if not any(x for _, x in rows):
        return ""
    lines = [
        "| after | KL from the base, nats a token | norm of the update | of the adapter |",
        "|---|---:|---:|---:|",
    ]
    for name, x in rows:
        cells = [x.get(key) for key in ("kl_from_base", "update_norm", "adapter_norm")] if x else [None] * 3
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines)
