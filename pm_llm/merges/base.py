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
from pm_llm.fisher.base import Fisher, Needs, Penalties
from pm_llm.methods import name_of_choice
from pm_llm.system.mapped import Zeros
from pm_llm.system.options import check_options

Factors = Mapping[str, LowRank]


class Probe(Protocol):
    """The current task's loss (:class:`pm_llm.fisher.probe.Probe` asks a live model for it)."""

    def loss(self, at: Factors) -> float:
        """The mean loss (nats an example) of the base model with the adapter `at`."""

    def slopes(self, at: Factors, towards: Sequence[Factors]) -> list[float]:
        """The derivatives of that loss at `at` towards each of the others."""


@dataclass(frozen=True)
class Trained:
    """How an adapter was trained, as far as a merge must know.

    `stands_on` is what the adapter is a change of: the `running` one, or the `base` model, of which it is then all of
    the change. `begins` is where training began: at the `merged` model, at the `last` adapter as it was trained, or at
    the `base` model. `began` is the first task's adapter as it began, for rules that merge A and B themselves. `probe`
    gives the loss on the task's rows, for rules that look at it.
    """

    stands_on: str = "running"
    begins: str = "merged"
    began: Factors = field(default_factory=dict)
    probe: Probe | None = None


@dataclass(frozen=True)
class Fold:
    """What a merge rule sees of one fold, per module: `task` (1, 2, ...), the running `M_{t-1}` (empty before the
    first task), the adapter just trained, how that was trained, and its Fisher."""

    task: int
    running: Factors
    new: Factors
    fisher: Fisher | None = None
    trained: Trained = field(default_factory=Trained)

    @property
    def is_whole(self) -> bool:
        """Whether the new adapter is the whole model right after training, and not a change of the running one."""
        return self.trained.stands_on == "base"

    def vector(self, name: str) -> LowRank:
        """What is new with the task: the task vector, or all of an adapter that began at the base model. Where it
        began at the last adapter as it was trained, the vector also holds what merging had taken off that one."""
        return self.new[name] if self.trained.begins == "base" else self.delta(name)

    def delta(self, name: str) -> LowRank:
        """The task vector `Delta_t = theta*_t - M_{t-1}` of a module."""
        if self.running and self.is_whole:
            return lowrank.add(self.new[name], self.running[name].scale(-1.0))
        return self.new[name]

    def theta(self, name: str) -> LowRank:
        """The model right after training, `theta*_t`."""
        if self.running and not self.is_whole:
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

    needs = Needs()
    quadratic = False  # whether the past tasks' quadratics are kept, see :meth:`penalties`
    needs_history = False  # whether a running adapter means nothing without the folds that made it
    old_adapters = False  # whether all tasks' adapters are kept
    dense = False  # whether the result can have full rank
    whole = False  # whether each task's whole model is kept, and not only its task vector
    adds = False  # whether an adapter that began at the base model is added as a whole, see :meth:`Fold.vector`
    brings = False  # whether a vector of other origin is in the first merge, which training goes on from
    in_factors = False  # whether A and B themselves are merged, of an adapter that continues in one rank
    stores = ""  # what is kept from task to task, besides the running adapter
    zeros: Zeros = staticmethod(torch.zeros)  # how sums that are kept are made

    def __post_init__(self) -> None:
        check_options(self, f"{name_of_choice(self)}: ")

    def ready(self) -> None:
        """Before a run. Raise PmLlmError if what the rule reads by itself is not there."""

    def coefficients(self, fold: Fold) -> Coefficients:
        """alpha_t for each module. Called once a fold, before :meth:`merge`; may look at every module."""
        raise NotImplementedError

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        """One module of the new running adapter, before truncation. Called on several threads."""
        new = fold.new[name].scale(alpha)
        instead = fold.is_whole and not (
            self.adds and fold.trained.begins == "base"
        )  # M + alpha (theta - M), with M's rank once
        if not fold.running or (instead and alpha == 1):
            return new
        past = fold.running[name]
        if not instead and not past.B.any():  # nothing is in it yet
            return new
        return lowrank.add(past.scale(1 - alpha) if instead else past, new)

    def direction(self, fold: Fold) -> dict[str, LowRank]:
        """The task vector of each module, as a change of its weights."""
        return {name: fold.delta(name) for name in fold.new}

    def inherit(self, fold: Fold, scaled: bool = True, weight: float = 1.0) -> None:
        """Remember what a run begins with: a past task that no fold has made.

        Args:
            fold: Its adapter as `new`, on what is remembered already as `running`, and its Fisher.
            scaled: Whether there is a task vector, by which its Fisher can be put on the common scale.
            weight: Of its Fisher.
        """

    def weights(self, name: str) -> tuple[Tensor, Tensor] | None:
        """How much the rows (d_out) and columns (d_in) of a module matter to the tasks so far, if the rule knows."""
        return None

    @property
    def is_sum(self) -> bool:
        """Whether it merges by `M_t = M_{t-1} + alpha_t Delta_t`, so that a task's part can be taken out again."""
        return type(self).merge is Merge.merge and not self.in_factors

    @property
    def weighs(self) -> bool:
        """Whether it knows :meth:`weights`, by which truncation can keep what matters to tasks."""
        return not self.in_factors and type(self).weights is not Merge.weights

    def penalties(self, running: Factors) -> Penalties:
        """Of all modules, what leaving `running` costs the past tasks by the quadratics that are kept of them."""
        return lambda live: []

    def remembers(self, n: int, m: int, r: int, tasks: int, whole: int, form: str | None) -> int:
        """How many numbers :meth:`state_dict` has of an (n, m) matrix after so many tasks, at most; an adapter is of
        rank r, a task's model of rank `whole`, the Fisher of that form."""
        return 0

    def truncated(self, name: str, change: LowRank) -> None:
        """The merged adapter of a module was truncated, which changed it by `change`."""

    def curvature_errors(self) -> dict[str, float]:
        """Relative errors of what is kept of past tasks."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What the rule must remember of past tasks; constant in their number, but for `old_adapters`."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`; also of what it gave before the first fold, where a fold failed."""


def entrywise(fold: Fold, name: str, alpha: float) -> LowRank:
    """`A_M + alpha (A_t - A_M)`, `B_M + alpha (B_t - B_M)`: the factors themselves, whose rank stays."""
    new = fold.new[name]
    if not fold.running:
        return new
    before = fold.running[name]
    return LowRank(before.B + alpha * (new.B - before.B), before.A + alpha * (new.A - before.A))


def check_coordinates(rule: str, fold: Fold) -> None:
    """Raise PmLlmError unless the two adapters' A and B can be compared entry by entry."""
    if fold.running and not fold.is_whole:
        raise PmLlmError(f"{rule}: the merge is of A and B themselves, so the adapter must continue (start continue).")
    for name, before in fold.running.items():
        if before.rank != fold.new[name].rank:
            raise PmLlmError(
                f"{rule}: the merge is of A and B themselves, so all tasks need one rank; module {name} has "
                f"{before.rank} in the running adapter and {fold.new[name].rank} in the new one."
            )
