"""What a report is made of: a finished run's results, with bootstrap intervals from its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval, interval, mean_interval, paired_difference
from pm_llm.evaluation.matrix import UNTRAINED, Matrix
from pm_llm.evaluation.predictions import Predictions, read_all
from pm_llm.run.folder import RunDir
from pm_llm.run.record import Results

if TYPE_CHECKING:
    from pm_llm.report.changes import Change


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    name: str
    results: Results
    logs: list[list[dict[str, Any]]]
    predictions: dict[int, dict[str, Predictions]]  # stage (-1: untrained) -> task -> predictions

    @cached_property
    def matrix(self) -> Matrix:
        """The scores."""
        return Matrix.from_results(self.results)

    @cached_property
    def intervals(self) -> dict[tuple[int, int], Interval]:
        """(stage, column) -> the score with its interval.

        Raises:
            PmLlmError: If predictions and results do not agree.
        """
        found = {}
        for stage, tasks in self.predictions.items():
            for name, predictions in tasks.items():
                at = stage, self.matrix.tasks.index(name)
                found[at] = interval(predictions)
                if abs(found[at].value - self.matrix.get(*at)) > 1e-6:
                    raise PmLlmError(
                        f"{self.path}: predictions after stage {stage + 1} give {found[at].value:.3f} on {name!r}, "
                        f"results.json says {self.matrix.get(*at):.3f}. The folder was changed, or scored by another "
                        "version of pm_llm; evaluate again."
                    )
        return found

    @cached_property
    def averages(self) -> dict[int, Interval]:
        """Stage -> average accuracy with its interval, where all tasks so far were scored."""
        said = {stage: self._said(stage) for stage in self.predictions if stage != UNTRAINED}
        return {stage: mean_interval(found) for stage, found in said.items() if found}

    @cached_property
    def changes(self) -> list[Change]:
        """What became of each ability and earlier task, see :func:`pm_llm.report.changes.changes`."""
        from pm_llm.report.changes import changes

        return changes(self)

    @property
    def final(self) -> list[Predictions]:
        """The predictions on the trained tasks after the last stage, or each one's own where the task is known.

        Raises:
            PmLlmError: If they were not made.
        """
        found = self._said(len(self.matrix.stages) - 1)
        if not found:
            raise PmLlmError(f"{self.path}: its tasks were not scored after their own stages (evaluate: final).")
        return found

    def _said(self, stage: int) -> list[Predictions]:
        """The predictions on all tasks trained by that stage; empty if one of them was not scored."""
        known = self.results.facts.knows_task
        at = {self.matrix.tasks[j]: i if known else stage for j, i in self.matrix.learned(stage).items()}
        made = all(name in self.predictions.get(i, {}) for name, i in at.items())
        return [self.predictions[i][name] for name, i in at.items()] if made else []


def open_run(path: str | Path) -> Run:
    """A finished run. Raises PmLlmError if it is not finished or lacks a prediction."""
    run_dir = RunDir.open(path)
    results = run_dir.results()
    method, folder = results.preset, run_dir.path.name
    stages = range(len(results.stages))
    scored = [*([UNTRAINED] if results.untrained else []), *stages]
    return Run(
        run_dir.path,
        method if method == folder else f"{method} ({folder})",
        results,
        [run_dir.log(stage) for stage in stages],
        {stage: read_all(run_dir.predictions(stage)) for stage in scored},
    )


def difference(a: Run, b: Run) -> Interval | None:
    """Final average of `a` minus that of `b`, paired by rows; None if they were not scored on the same, alike."""
    if a.results.mode != b.results.mode:
        return None
    try:
        x, y = ({one.task: one for one in run.final} for run in (a, b))
        tasks = sorted(x)
        if sorted(y) != tasks:
            return None
        return paired_difference([x[name] for name in tasks], [y[name] for name in tasks])
    except PmLlmError:  # other rows, or none: there is no difference to give
        return None
