"""What is written down of a stage when it is committed, and of a run when it is finished: everything reads these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# numbers of a run, by what they are called in `results.json`, with how they are shown
NUMBERS = {
    "average_accuracy": "average accuracy",
    "average_over_time": "average over time",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
    "plasticity": "plasticity",
    "fuar": "FUAR",
}
Losses = Sequence[float]  # before and after training, in nats an example


@dataclass(frozen=True)
class Facts:
    """What is true of a method as it was run, whatever a name stands for later.

    `is_preset` says whether its three words were its preset's own, `keeps_rows` whether rows of past tasks were
    trained on again, `knows_task` whether its result is used with the task known (an adapter for each).
    """

    is_preset: bool = True
    keeps_rows: bool = False
    knows_task: bool = False


@dataclass
class StageRecord:
    """What a stage did.

    `words` are the method's three, `config` the run's keys as they were; coefficients are of the model (a mean) and of
    each module, raw before clipping; `shift` is how far the model went from its base (:mod:`pm_llm.evaluation.shift`):
    `kl_from_base` in nats an answer token, `update_norm` of the task's adapter, `adapter_norm` of the merged one;
    `seconds` and `peak_memory_bytes` are by part of the stage; `scores` holds for
    each task that was scored `score` and the file of `predictions`. `folder` is the stage's in the run, `remembers`
    says whether the merge keeps something from task to task.
    """

    task: str
    seed: int
    config: dict[str, Any]
    words: dict[str, Any]
    facts: Facts
    versions: dict[str, str]
    processes: int
    coefficient: float
    raw_coefficient: float
    clipped: bool
    coefficients: dict[str, float]
    raw_coefficients: dict[str, float]
    truncation_error: float
    rank: int
    curvature: float | None
    curvature_errors: dict[str, float]
    constraint_reports: dict[str, float]
    losses: Losses | None
    exact_curvature: float | None
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: str = ""
    remembers: bool = False
    shift: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> StageRecord:
        """From JSON. Raises TypeError if a key is missing or not known."""
        return cls(**{**found, "facts": Facts(**found["facts"])})

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass
class Results:
    """What came out of a finished run: a list has an element a stage, or a column a scored task; `aside` are tasks
    that no average is of, see :class:`pm_llm.evaluation.matrix.Matrix`.

    `method` are the three words, `stage_settings` in what a stage's settings differ from the run's last, `numbers`
    those of `NUMBERS` that were measured (FUAR is None where nothing was gained).
    """

    config: dict[str, Any]
    method: dict[str, Any]
    tasks: list[str]
    stages: list[str]
    matrix: list[list[float | None]]
    coefficients: list[float]
    lower_is_better: bool = False
    aside: list[str] = field(default_factory=list)
    untrained: dict[str, float] | None = None
    scorers: list[str] = field(default_factory=list)
    test_rows: list[int] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    versions: dict[str, str] = field(default_factory=dict)
    stage_settings: list[list[str]] = field(default_factory=list)
    raw_coefficients: list[float] = field(default_factory=list)
    module_coefficients: list[dict[str, float]] = field(default_factory=list)
    truncation_errors: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    curvatures: list[float | None] = field(default_factory=list)
    curvature_errors: list[dict[str, float]] = field(default_factory=list)
    exact_curvatures: list[float | None] = field(default_factory=list)
    constraint_reports: list[dict[str, float]] = field(default_factory=list)
    losses: list[Losses | None] = field(default_factory=list)
    shifts: list[dict[str, float | None]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak_memory_bytes: list[int] = field(default_factory=list)
    numbers: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Results:
        """From JSON, in which the numbers stand beside the rest; what is not known is left out."""
        known = {f.name: found[f.name] for f in dataclasses.fields(cls) if f.name in found and f.name != "numbers"}
        numbers = {key: found[key] for key in NUMBERS if key in found}
        return cls(**{**known, "facts": Facts(**found.get("facts", {})), "numbers": numbers})

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        return {**found, **found.pop("numbers")}

    @property
    def preset(self) -> str:
        """The method's name in the configuration; its words may have been replaced, see :class:`Facts`."""
        return str(self.config["method"])

    @property
    def split(self) -> str:
        """The rows that were scored: `test` or `validation`."""
        return str(self.config.get("evaluation", {}).get("split", "test"))

    @property
    def mode(self) -> str:
        """How tasks with labels were scored: `generate` or `labels`."""
        return str(self.config.get("evaluation", {}).get("mode", "generate"))
