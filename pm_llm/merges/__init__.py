"""Merges: how a trained task joins the running adapter, by exact low-rank algebra. Each rule is one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pm_llm import lowrank
from pm_llm.accumulators import Zeros
from pm_llm.adapters import Adapter, check_same_place
from pm_llm.errors import PmLlmError
from pm_llm.fisher import Fisher
from pm_llm.lowrank import LowRank
from pm_llm.methods import Choice

Factors = dict[str, LowRank]


@dataclass(frozen=True)
class Fold:
    """What a merge rule sees: `task` (1, 2, ...), the running `M_{t-1}` (empty before the first task), the task
    vector `Delta_t = theta*_t - M_{t-1}` and the model right after training `theta*_t`, per module."""

    task: int
    running: Factors
    delta: Factors
    theta: Factors
    fisher: Fisher | None = None


@dataclass(frozen=True)
class Coefficients:
    """`used` after clipping and `raw` before it, one per module or the same for all."""

    used: dict[str, float]
    raw: dict[str, float]

    @classmethod
    def same(cls, value: float, modules: Factors) -> Coefficients:
        """One value for every module."""
        return cls(dict.fromkeys(modules, value), dict.fromkeys(modules, value))


class Merge:
    """A merge rule. Most rules only choose the coefficient of `M_t = M_{t-1} + alpha_t Delta_t`."""

    needs_fisher = False
    zeros: Zeros = staticmethod(torch.zeros)  # how sums that are kept are made
    needs_history = False  # whether a running adapter means nothing without the folds that made it

    def coefficients(self, fold: Fold) -> Coefficients:
        """alpha_t for each module."""
        raise NotImplementedError

    def fold(self, fold: Fold) -> tuple[Factors, Coefficients]:
        """The new running factors, before truncation, and the coefficients."""
        alpha = self.coefficients(fold)
        merged = {}
        for name, delta in fold.delta.items():
            update = delta.scale(alpha.used[name])
            merged[name] = lowrank.add(fold.running[name], update) if fold.running else update
        return merged, alpha

    def state(self) -> dict[str, Tensor]:
        """What the rule must remember of past tasks (constant in their number)."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""


@dataclass
class FoldReport:
    """What one fold did. `truncation_error` is the relative Frobenius error over all modules (0: exact)."""

    coefficients: dict[str, float] = field(default_factory=dict)
    raw_coefficients: dict[str, float] = field(default_factory=dict)
    truncation_error: float = 0.0
    truncation_errors: dict[str, float] = field(default_factory=dict)
    rank: int = 0

    @property
    def coefficient(self) -> float:
        """The mean over the modules of the coefficients used (the coefficient itself where there is only one)."""
        return sum(self.coefficients.values()) / len(self.coefficients)

    @property
    def raw_coefficient(self) -> float:
        """The same before clipping."""
        return sum(self.raw_coefficients.values()) / len(self.raw_coefficients)

    @property
    def clipped(self) -> bool:
        """Whether any coefficient was clipped."""
        return self.coefficients != self.raw_coefficients


class Merger:
    """Folds one trained adapter after another into a running one.

        merger = Merger("optimal", max_rank=64)
        running = merger.fold(None, first, fisher=fisher_1)
        running = merger.fold(running, second, fisher=fisher_2)

    Args:
        rule: Name of a merge rule, a mapping with `name` and options, or a rule object.
        max_rank: Truncate the result to this rank (Eckart-Young); None: never, the rank grows with every task.
        options: Options of the rule, e.g. `granularity="module"`.
    """

    def __init__(self, rule: str | dict | Choice | Merge, max_rank: int | None = None, **options: Any) -> None:
        if max_rank is not None and max_rank < 1:
            raise PmLlmError(f"max_rank is {max_rank}; it must be at least 1, or None for no truncation.")
        if isinstance(rule, Merge):
            self.rule = rule
        else:
            choice = Choice.parse(rule, "merge")
            self.rule = Choice(choice.name, {**choice.options, **options}).build("merge")
        self.max_rank = max_rank
        self.tasks = 0
        self.report = FoldReport()

    def fold(
        self,
        running: Adapter | str | Path | None,
        new: Adapter | str | Path,
        fisher: Fisher | None = None,
        continues: bool = False,
    ) -> Adapter:
        """The new running adapter; :attr:`report` says what was done.

        Args:
            running: The merged adapter of the tasks so far (or its folder); None before the first task.
            new: The adapter just trained (or its folder), on top of the frozen running one.
            fisher: The task's Fisher, for rules that need it.
            continues: Whether `new` itself began as the running adapter, so that it already holds it.

        Raises:
            PmLlmError: If the adapters do not belong together, cannot be folded exactly, or a Fisher is missing.
        """
        running = Adapter.load(running) if isinstance(running, (str, Path)) else running
        new = Adapter.load(new) if isinstance(new, (str, Path)) else new
        for which, adapter in (("running", running), ("new", new)):
            if adapter is not None:
                adapter.check_finite(which)
        if running is not None:
            check_same_place(running, new)
        if self.rule.needs_fisher and fisher is None:
            raise PmLlmError(f"merge rule {type(self.rule).__name__} needs the task's Fisher; give fisher=...")
        if running is not None and self.rule.needs_history and self.tasks == 0:
            raise PmLlmError(
                f"merge rule {type(self.rule).__name__} has folded no task yet but got a running adapter. "
                "Fold the first task with running=None, or call load_state with what an earlier Merger left."
            )
        past = running.factors if running is not None else {}
        delta, theta = new.factors, new.factors
        if past and continues:
            delta = {n: lowrank.add(x, past[n].scale(-1.0)) for n, x in new.factors.items()}
        elif past:
            theta = {n: lowrank.add(past[n], x) for n, x in new.factors.items()}
        merged, alpha = self.rule.fold(Fold(self.tasks + 1, past, delta, theta, fisher))
        merged, self.report = self._truncated(merged)
        self.report.coefficients, self.report.raw_coefficients = alpha.used, alpha.raw
        self.tasks += 1
        return new.replace_factors(merged)

    def _truncated(self, factors: Factors) -> tuple[Factors, FoldReport]:
        kept, errors, lost_sum, total_sum = {}, {}, 0.0, 0.0
        for name, x in factors.items():
            kept[name], lost, total = (x, 0.0, 0.0) if self.max_rank is None else lowrank.truncate(x, self.max_rank)
            errors[name] = sqrt(lost / total) if total > 0 else 0.0
            lost_sum, total_sum = lost_sum + lost, total_sum + total
        error = sqrt(lost_sum / total_sum) if total_sum > 0 else 0.0
        return kept, FoldReport({}, {}, error, errors, max(x.rank for x in kept.values()))

    def state(self) -> dict[str, Tensor]:
        """Tensors to go on from (constant in the number of tasks); :attr:`tasks` is the other half."""
        return self.rule.state()

    def load_state(self, state: dict[str, Tensor], tasks: int) -> None:
        """Go on after `tasks` folds."""
        self.rule.load_state(state)
        self.tasks = tasks
