"""A gate: whether the last task of a run cost more than it may, and brought what it should.

What a task lost is its score after its own stage minus that after the last one, what a probe lost its score before
training minus that; both on the same rows, with the interval of the paired bootstrap (:mod:`pm_llm.evaluation.
intervals`), so that the noise of few rows is measured and not taken for a loss. As many things are guarded at once,
all of it together is of the level (Bonferroni). That few rows vary is not all: a loss must also be one that is rare
where nothing was lost (:func:`pm_llm.evaluation.intervals.swap_test`), so that of such runs at most 1 - level are
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval, paired_difference, swap_test
from pm_llm.evaluation.matrix import UNTRAINED
from pm_llm.evaluation.predictions import Predictions, read_all
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.run.folder import RunDir

PASSED, LOST, NOT_GAINED = 0, 3, 4  # exit statuses
RESAMPLES = 4000  # the tails of many intervals at once are thin


class GateError(PmLlmError):
    """A task cost more than it may, or did not bring what it should; `status` is the exit status."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status


@dataclass(frozen=True)
class Course:
    """A run as far as it has come: the task of each stage, and what was answered after it (-1: before training)."""

    path: Path
    stages: Sequence[str]
    predictions: Mapping[int, Mapping[str, Predictions]]
    knows_task: bool = False

    @classmethod
    def of(cls, run_dir: RunDir) -> Course:
        """That of a run, finished or not. Raises PmLlmError if it has finished no task."""
        stages = run_dir.state()["stages"]
        if not stages:
            raise PmLlmError(f"{run_dir.path} has finished no task yet: there is nothing to judge.")
        return cls(
            run_dir.path,
            [stage.task for stage in stages],
            {i: read_all(run_dir.predictions(i)) for i in range(UNTRAINED, len(stages))},
            stages[-1].facts.knows_task,
        )

    @property
    def guarded(self) -> dict[str, int]:
        """What may not be lost, with the stage after which it was as it should be."""
        own = {name: i for i, name in enumerate(self.stages)}
        last = len(self.stages) - 1
        before = self.predictions.get(UNTRAINED, {})
        return {name: i for name, i in own.items() if i < last} | {
            name: UNTRAINED for name in self.probes if name in before
        }

    @property
    def probes(self) -> list[str]:
        """All that is scored after the last stage and was never trained; no task that is yet to come."""
        return [name for name in self.predictions.get(len(self.stages) - 1, {}) if name not in self.stages]

    @property
    def not_guarded(self) -> list[str]:
        """Probes that were not scored before training, so that nobody knows what they lost."""
        return [name for name in self.probes if name not in self.guarded]

    @property
    def warnings(self) -> list[str]:
        """A line for each of them."""
        why = "was not scored before training (set evaluate to all, or a gate in the run)"
        return [f"not guarded: {name} {why}" for name in self.not_guarded]


@dataclass(frozen=True)
class Verdict:
    """One task's part: `change` is what it lost (`what` "lost") or gained, in points of its score, or in percent of
    what it was where lower is better (a perplexity); `limit` what was asked for; `broken` whether the gate fails."""

    task: str
    what: str
    before: float
    after: float
    unit: str
    change: float
    low: float
    high: float
    limit: float
    broken: bool

    def line(self) -> str:
        """As one line."""
        word = {("lost", True): "LOST", ("lost", False): "kept", ("gained", True): "NOT GAINED"}
        said = word.get((self.what, self.broken), "gained")
        return (
            f"{said} {self.task}: {self.before:.1f} -> {self.after:.1f}, {self.what} {self.change:.1f} {self.unit} "
            f"({self.low:.1f} to {self.high:.1f}), limit {self.limit:g}"
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(run: Course, lose: float, gain: float | None = None, level: float = 0.95) -> list[Verdict]:
    """What each earlier task and probe lost, and what the last task gained, as verdicts.

    A loss breaks the gate if even the lower end of its interval is above `lose`, and it is no chance; a gain if it is
    below `gain`, or its interval holds 0.

    Args:
        run: A run of at least one task.
        lose: How many points (percent of a perplexity) may be lost.
        gain: How many the last task must have gained; None: it is not looked at.
        level: Of the losses' intervals together, and of the gain's.

    Raises:
        PmLlmError: If a score that this needs was not measured.
    """
    if run.knows_task:
        raise PmLlmError(f"{run.path}: its result is used with the task known, so no task can cost another anything.")
    last, guarded = len(run.stages) - 1, run.guarded
    new = run.stages[last]
    each = 1 - (1 - level) / max(1, len(guarded))
    found = []
    for name, stage in guarded.items():
        before, after = _of(run, name, stage), _of(run, name, last)
        lost, unit = _change(after, before, -1, each)
        broken = lost.low > lose and swap_test(before, after, RESAMPLES) < (1 - each) / 2
        found.append(_verdict(name, "lost", before, after, unit, lost, lose, broken))
    if gain is not None:
        stages = [i for i in range(last - 1, UNTRAINED - 1, -1) if new in run.predictions.get(i, {})]
        if not stages:
            raise PmLlmError(f"{run.path}: task {new!r} was not scored before it was trained. Set evaluate to all.")
        before, after = _of(run, new, stages[0]), _of(run, new, last)
        won, unit = _change(after, before, 1, level)
        found.append(_verdict(new, "gained", before, after, unit, won, gain, won.value < gain or won.low <= 0))
    return found


def status_of(verdicts: list[Verdict]) -> int:
    """0 if all is well, 3 if something was lost, 4 if the last task did not gain."""
    if any(one.broken and one.what == "lost" for one in verdicts):
        return LOST
    return NOT_GAINED if any(one.broken for one in verdicts) else PASSED


def said_of(run: Course, verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each reason why a gate fails; else one line that it passed."""
    broken = [one.line() for one in verdicts if one.broken]
    counted = sum(one.what == "lost" for one in verdicts)
    return [*(broken or [f"gate: {run.stages[-1]} passed, {counted} guarded"]), *run.warnings]


def _of(run: Course, name: str, stage: int) -> Predictions:
    try:
        return run.predictions[stage][name]
    except KeyError:
        when = "before training" if stage == UNTRAINED else f"after {run.stages[stage]!r}"
        raise PmLlmError(
            f"{run.path}: no predictions on {name!r} {when} are kept. The gate needs evaluate seen or all, and "
            "keep_test_rows."
        ) from None


def _change(after: Predictions, before: Predictions, sign: int, level: float) -> tuple[Interval, str]:
    """`sign` times how much better `after` is than `before`, with its unit."""
    low = scorer_named(after.scorer).lower_is_better
    scale, unit = (-100 / before.score(), "percent") if low else (1.0, "points")
    found = paired_difference([after], [before], RESAMPLES, level=level)
    value, *ends = (0.0 + sign * scale * x for x in (found.value, found.low, found.high))  # and no -0
    return Interval(value, min(ends), max(ends), level), unit


def _verdict(
    name: str,
    what: str,
    before: Predictions,
    after: Predictions,
    unit: str,
    change: Interval,
    limit: float,
    broken: bool,
) -> Verdict:
    return Verdict(
        name, what, before.score(), after.score(), unit, change.value, change.low, change.high, limit, broken
    )
