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
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval, paired_difference, swap_test
from pm_llm.evaluation.matrix import UNTRAINED
from pm_llm.evaluation.plan import is_general
from pm_llm.evaluation.predictions import Predictions, read_all
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.run.folder import RunDir

MEAN = "mean of the general abilities"
PASSED, LOST, NOT_GAINED = 0, 3, 4  # exit statuses
RESAMPLES = 4000  # the tails of many intervals at once are thin


class GateError(PmLlmError):
    """A task cost more than it may, or did not bring what it should; `status` is the exit status."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status


@dataclass(frozen=True)
class Course:
    """A run as far as it has come: the task of each stage, and what was answered after it (-1: before training);
    `to_come` are tasks that are not trained yet, on which it may have been scored."""

    path: Path
    stages: Sequence[str]
    predictions: Mapping[int, Mapping[str, Predictions]]
    knows_task: bool = False
    to_come: frozenset[str] = frozenset()

    @classmethod
    def of(cls, run_dir: RunDir) -> Course:
        """That of a run, finished or not. Raises PmLlmError if it has finished no task."""
        state = run_dir.state()
        stages = state["stages"]
        if not stages:
            raise PmLlmError(f"{run_dir.path} has finished no task yet: there is nothing to judge.")
        return cls(
            run_dir.path,
            [stage.task for stage in stages],
            {i: read_all(run_dir.predictions(i)) for i in range(UNTRAINED, len(stages))},
            stages[-1].facts.knows_task,
            frozenset(state["tasks"][len(stages) :]),
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
        scored = self.predictions.get(len(self.stages) - 1, {})
        return [name for name in scored if name not in self.stages and name not in self.to_come]

    @property
    def not_guarded(self) -> list[str]:
        """Probes that were not scored before training, so that nobody knows what they lost."""
        return [name for name in self.probes if name not in self.guarded]

    def warnings(self, level: float) -> list[str]:
        """A line for each of them, and for what has too few rows for any loss to be told from chance at `level`."""
        why = "was not scored before training (set evaluate to all, or a gate in the run)"
        found = [f"not guarded: {name} {why}" for name in self.not_guarded]
        last, least = self.predictions.get(len(self.stages) - 1, {}), _chance(level, len(self.columns))
        few = [name for name in self.guarded if name in last and 0.5 ** len(last[name].predictions) >= least]
        return found + [
            f"not guarded: {name} has {len(last[name].predictions)} rows, too few to tell any loss from chance"
            for name in few
        ]

    @property
    def columns(self) -> list[list[str]]:
        """What is looked at by itself: each that is guarded, and general abilities together."""
        general = [name for name in self.guarded if is_general(name) and self._by_row(name)]
        return [*([name] for name in self.guarded), *([general] if len(general) > 1 else [])]

    def _by_row(self, name: str) -> bool:
        found = self.predictions[UNTRAINED].get(name)
        return found is not None and scorer_named(found.scorer).by_row


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
    each = 1 - (1 - level) / max(1, len(run.columns))
    found = []
    for names in run.columns:
        before = [_of(run, name, guarded[name]) for name in names]
        after = [_of(run, name, last) for name in names]
        lost, unit = _change(after, before, -1, each)
        broken = lost.low > lose and swap_test(before, after, RESAMPLES) < _chance(level, len(run.columns))
        blown = not isfinite(mean_score(after))  # a model that says no number any more
        shown = names[0] if len(names) == 1 else MEAN
        found.append(_verdict(shown, "lost", before, after, unit, lost, lose, broken or blown))
    if gain is not None:
        stages = [i for i in range(last - 1, UNTRAINED - 1, -1) if new in run.predictions.get(i, {})]
        if not stages:
            raise PmLlmError(f"{run.path}: task {new!r} was not scored before it was trained. Set evaluate to all.")
        before, after = [_of(run, new, stages[0])], [_of(run, new, last)]
        won, unit = _change(after, before, 1, level)
        found.append(_verdict(new, "gained", before, after, unit, won, gain, won.value < gain or won.low <= 0))
    return found


def status_of(verdicts: list[Verdict]) -> int:
    """0 if all is well, 3 if something was lost, 4 if the last task did not gain."""
    if any(one.broken and one.what == "lost" for one in verdicts):
        return LOST
    return NOT_GAINED if any(one.broken for one in verdicts) else PASSED


def refuse_failed(run_dir: RunDir) -> None:
    """Raise GateError if a run with a gate that stops is not to be handed out."""
    gate = run_dir.state()["config"].get("gate", {})  # runs of before have none
    if gate.get("lose") is None or gate["action"] == "warn":
        return
    status, lines = verdict_of(Course.of(run_dir), gate["lose"], None, gate["level"])
    if status:
        raise GateError(
            f"{run_dir.path} does not pass its own gate, so it is not handed out:\n{lines}\nTake the task back "
            "(pm-llm restore), or run the same command with a gate that allows more.",
            status,
        )


def _chance(level: float, columns: int) -> float:
    """How rare a loss must be where nothing was lost, if so many are looked at."""
    return (1 - level) / max(1, columns) / 2


def mean_score(found: Sequence[Predictions]) -> float:
    """The mean of their scores."""
    return fmean(one.score() for one in found)


def verdict_of(run: Course, lose: float, gain: float | None, level: float) -> tuple[int, str]:
    """The exit status of :func:`judge`; and a line for each reason why the gate fails, else one line that it passed,
    and for what it cannot see."""
    verdicts = judge(run, lose, gain, level)
    broken = [one.line() for one in verdicts if one.broken]
    counted = sum(one.what == "lost" for one in verdicts)
    lines = [*(broken or [f"gate: {run.stages[-1]} passed, {counted} guarded"]), *run.warnings(level)]
    return status_of(verdicts), "\n".join(lines)


def _of(run: Course, name: str, stage: int) -> Predictions:
    try:
        return run.predictions[stage][name]
    except KeyError:
        when = "before training" if stage == UNTRAINED else f"after {run.stages[stage]!r}"
        raise PmLlmError(
            f"{run.path}: no predictions on {name!r} {when} are kept. The gate needs evaluate seen or all, and "
            "keep_test_rows."
        ) from None


def _change(
    after: Sequence[Predictions], before: Sequence[Predictions], sign: int, level: float
) -> tuple[Interval, str]:
    """`sign` times how much better `after` is than `before`, with its unit."""
    low = scorer_named(after[0].scorer).lower_is_better
    scale, unit = (-100 / mean_score(before), "percent") if low else (1.0, "points")
    found = paired_difference(after, before, RESAMPLES, level=level)
    value, *ends = (0.0 + sign * scale * x for x in (found.value, found.low, found.high))  # and no -0
    return Interval(value, min(ends), max(ends), level), unit


def _verdict(
    name: str,
    what: str,
    before: Sequence[Predictions],
    after: Sequence[Predictions],
    unit: str,
    change: Interval,
    limit: float,
    broken: bool,
) -> Verdict:
    return Verdict(
        name, what, mean_score(before), mean_score(after), unit, change.value, change.low, change.high, limit, broken
    )
