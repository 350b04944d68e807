"""What a merge is: the protocol, what it is given, and helpers of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.starts.base import Start, check_continues
from pm_llm.system.mapped import Zeros

Factors = Mapping[str, LowRank]


class Probe(Protocol):
    """The current task's loss (:class:`pm_llm.fisher.probe.Probe` asks a live model for it)."""

    def loss(self, at: Factors) -> float:
        """The mean loss (nats an example) of the base model with the adapter `at`."""

    def slopes(self, at: Factors, towards: Sequence[Factors]) -> list[float]:
        """The derivatives of that loss at `at` towards each of the others."""


@dataclass(frozen=True)
class Fold:
    """What a merge rule sees: `task` (1, 2, ...), the running `M_{t-1}` (empty before the first task) and the adapter
    just trained, per module; `continues` is whether that one stands on the base model, so that it is the whole model
    right after training, and not a change of the running one; `on_base` whether it began there, too.
    `start` is the first task's adapter as it began (empty: not known). `probe` gives the loss on the current task's
    rows."""

    task: int
    running: Factors
    new: Factors
    continues: bool = False
    fisher: Fisher | None = None
    start: Factors = field(default_factory=dict)
    probe: Probe | None = None
    on_base: bool = False

    def vector(self, name: str) -> LowRank:
        """What is new with the task: the task vector, or all of an adapter that began at the base model. (Where it
        began at the last adapter as it was trained, start last or orthogonal, the vector also brings back what merging
        took off that.)"""
        return self.new[name] if self.on_base else self.delta(name)

    def delta(self, name: str) -> LowRank:
        """The task vector `Delta_t = theta*_t - M_{t-1}` of a module."""
        if self.running and self.continues:
            return lowrank.add(self.new[name], self.running[name].scale(-1.0))
        return self.new[name]

    def theta(self, name: str) -> LowRank:
        """The model right after training, `theta*_t`."""
        if self.running and not self.continues:
            return lowrank.add(self.running[name], self.new[name])
        return self.new[name]


@dataclass(frozen=True)
class Coefficients:
    """`used` after clipping and `raw` before it, one per module or the same for all."""

    used: dict[str, float]
    raw: dict[str, float]

    @classmethod
    def same(cls, value: float, modules: Iterable[str]) -> Coefficients:
        """One value for every module."""
        return cls(dict.fromkeys(modules, value), dict.fromkeys(modules, value))


class Merge:
    """A merge rule. Most rules only choose the coefficient of `M_t = M_{t-1} + alpha_t Delta_t`."""

    needs_fisher = False
    space = "weights"  # where that Fisher lives
    form: str | None = None  # of a Fisher of the weights; None: the configuration's, see `fisher_form`
    needs_direction = False  # whether that Fisher must hold the exact curvature along the task vector
    needs_losses = False  # whether it must hold the loss before and after training
    needs_probe = False  # whether `fold.probe` must be there
    needs_history = False  # whether a running adapter means nothing without the folds that made it
    old_adapters = False  # whether all tasks' adapters are kept
    dense = False  # whether the result's rank may be any, whatever the adapters' ranks
    whole = False  # whether what is kept of a task is its model, not its task vector
    adds = False  # whether all of an adapter that began at the base model is new, see :meth:`Fold.vector`
    in_factors = False  # whether A and B themselves are merged, of an adapter that continues in one rank
    stores = ""  # what is kept from task to task, besides the running adapter
    zeros: Zeros = staticmethod(torch.zeros)  # how sums that are kept are made

    def fisher_form(self, configured: str) -> str:
        """The form of that Fisher: `factors` in their space, else its own, else the configuration's."""
        return "factors" if self.space == "factors" else self.form or configured

    def check(self, start: Start) -> None:
        """Raise PmLlmError if the rule means nothing with this start."""
        if self.in_factors:
            rule = f"merge {type(self).__name__.lower()}"
            check_continues(rule, start)
            if self.needs_fisher and not start.keeps_coordinates:
                raise PmLlmError(
                    f"{rule} weights A and B entry by entry: it needs a start that keeps A and B as they were "
                    f"(continue or last). The start is {start.name()!r}."
                )

    def coefficients(self, fold: Fold) -> Coefficients:
        """alpha_t for each module. Called once a fold, before :meth:`merge`; may look at every module."""
        raise NotImplementedError

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        """One module of the new running adapter, before truncation. Called on several threads."""
        new = fold.new[name].scale(alpha)
        instead = fold.continues and not (self.adds and fold.on_base)  # M + alpha (theta - M), with M's rank once
        if not fold.running or (instead and alpha == 1):
            return new
        past = fold.running[name]
        return lowrank.add(past.scale(1 - alpha) if instead else past, new)

    def direction(self, fold: Fold) -> dict[str, LowRank]:
        """The task vector of each module, as a change of its weights."""
        return {name: fold.delta(name) for name in fold.new}

    def weights(self, name: str) -> tuple[Tensor, Tensor] | None:
        """How much the rows (d_out) and columns (d_in) of a module matter to the tasks so far, if the rule knows."""
        return None

    def truncated(self, name: str, change: LowRank) -> None:
        """The merged adapter of a module was truncated, which changed it by `change`."""

    def curvature_errors(self) -> dict[str, float]:
        """Relative errors of what is kept of past tasks."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What the rule must remember of past tasks; constant in their number, but for `old_adapters`."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`; also of what it gave before the first fold, where a fold failed."""


def check_space(rule: str, space: str) -> bool:
    """Whether `space` is factors. Raises PmLlmError if it is neither that nor weights."""
    if space not in ("weights", "factors"):
        raise PmLlmError(f"{rule}: space is {space!r}; it must be weights or factors.")
    return space == "factors"


def entrywise(fold: Fold, name: str, alpha: float) -> LowRank:
    """`A_M + alpha (A_t - A_M)`, `B_M + alpha (B_t - B_M)`: the factors themselves, whose rank stays."""
    new = fold.new[name]
    if not fold.running:
        return new
    before = fold.running[name]
    return LowRank(before.B + alpha * (new.B - before.B), before.A + alpha * (new.A - before.A))


def check_coordinates(rule: str, fold: Fold) -> None:
    """Raise PmLlmError unless the two adapters' A and B can be compared entry by entry."""
    if fold.running and not fold.continues:
        raise PmLlmError(f"{rule}: the merge is of A and B themselves, so the adapter must continue (start continue).")
    for name, before in fold.running.items():
        if before.rank != fold.new[name].rank:
            raise PmLlmError(
                f"{rule}: the merge is of A and B themselves, so all tasks need one rank; module {name} has "
                f"{before.rank} in the running adapter and {fold.new[name].rank} in the new one."
            )
