"""Merges: how a trained task joins the running adapter, by exact low-rank algebra. Each rule is one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pm_llm import lowrank
from pm_llm.accumulators import Zeros
from pm_llm.adapters import Adapter, check_same_place
from pm_llm.errors import PmLlmError
from pm_llm.fisher import Fisher
from pm_llm.lowrank import LowRank
from pm_llm.methods import Choice
from pm_llm.parallel import each
from pm_llm.starts import Start, check_continues

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


@dataclass
class FoldReport:
    """What one fold did. `truncation_error` is the relative Frobenius error over all modules (0: exact);
    `curvature_errors` the same of what the rule remembers."""

    coefficients: dict[str, float] = field(default_factory=dict)
    raw_coefficients: dict[str, float] = field(default_factory=dict)
    truncation_error: float = 0.0
    truncation_errors: dict[str, float] = field(default_factory=dict)
    rank: int = 0
    curvature_errors: dict[str, float] = field(default_factory=dict)

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
        truncation: `plain`, or `fisher`: rows and columns weighted by the roots of the past Fishers' row and column
            sums, for rules that keep a Fisher in the space of the weights.
        options: Options of the rule, e.g. `granularity="module"`.
    """

    def __init__(
        self,
        rule: str | dict | Choice | Merge,
        max_rank: int | None = None,
        truncation: str = "plain",
        **options: Any,
    ) -> None:
        if max_rank is not None and max_rank < 1:
            raise PmLlmError(f"max_rank is {max_rank}; it must be at least 1, or None for no truncation.")
        if isinstance(rule, Merge):
            self.rule = rule
        else:
            choice = Choice.parse(rule, "merge")
            self.rule = Choice(choice.name, {**choice.options, **options}).build("merge")
        if truncation not in ("plain", "fisher"):
            raise PmLlmError(f"truncation is {truncation!r}; it must be plain or fisher.")
        if truncation == "fisher" and (not self.rule.needs_fisher or self.rule.in_factors):
            raise PmLlmError(f"truncation fisher needs a merge that keeps one; {type(self.rule).__name__} does not.")
        self.max_rank, self.truncation = max_rank, truncation
        self.tasks = 0
        self.report = FoldReport()

    def fold(
        self,
        running: Adapter | str | Path | None,
        new: Adapter | str | Path,
        fisher: Fisher | Mapping[str, Tensor] | None = None,
        continues: bool = False,
        start: Adapter | None = None,
        zeros: Zeros | None = None,
        probe: Probe | None = None,
        on_base: bool = False,
    ) -> Adapter:
        """The new running adapter; :attr:`report` says what was done. Modules are worked on one by one, in parallel.

        Args:
            running: The merged adapter of the tasks so far (or its folder); None before the first task.
            new: The adapter just trained (or its folder), on top of the frozen running one.
            fisher: The task's Fisher, for rules that need it; tensors are dense Fishers, (d_out, d_in).
            continues: Whether `new` stands on the base model, not on the running adapter.
            on_base: Whether it began there too (start alone), and not at what was learned before.
            start: The first task's adapter as it began, for rules in the space of the factors.
            probe: For rules that look at the loss, see :class:`Fold`.
            zeros: Where to put the result, see :mod:`pm_llm.accumulators`; by default in memory.

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
            new = new.beside(running)
        if self.rule.needs_fisher and fisher is None:
            raise PmLlmError(f"merge rule {type(self.rule).__name__} needs the task's Fisher; give fisher=...")
        if self.rule.needs_probe and running is not None and probe is None:
            raise PmLlmError(f"merge rule {type(self.rule).__name__} looks at the task's loss; give probe=...")
        if running is not None and self.rule.needs_history and self.tasks == 0:
            raise PmLlmError(
                f"merge rule {type(self.rule).__name__} has folded no task yet but got a running adapter. "
                "Fold the first task with running=None, or call load_state with what an earlier Merger left."
            )
        fold = Fold(
            self.tasks + 1,
            running.factors if running is not None else {},
            new.factors,
            continues,
            None if fisher is None else Fisher.of(fisher),
            start.factors if start is not None else {},
            probe,
            on_base,
        )
        before = self.rule.state()
        try:
            return new.replace_factors(self._folded(fold, zeros))
        except BaseException:  # the same fold may be tried again
            self.rule.load_state(before)
            raise

    def _folded(self, fold: Fold, zeros: Zeros | None) -> dict[str, LowRank]:
        """The new running adapter's modules; counts the task."""
        alpha = self.rule.coefficients(fold)

        def module(name: str) -> tuple[LowRank, float, float]:
            merged = self.rule.merge(fold, name, alpha.used[name])
            kept, lost, total = self._truncated(name, merged, fold.new[name].rank)
            if lost > 0:
                self.rule.truncated(name, lowrank.add(kept, merged.scale(-1.0)))
            kept = lowrank.trimmed(kept)
            if not (torch.isfinite(kept.B).all() and torch.isfinite(kept.A).all()):
                raise PmLlmError(f"merging makes weights that are NaN or infinite in {name}. Lower the coefficient.")
            if zeros is not None:
                kept = LowRank(zeros(*kept.B.shape).copy_(kept.B), zeros(*kept.A.shape).copy_(kept.A))
            elif kept is merged:  # it may hold a mapped file's own tensors
                kept = LowRank(kept.B.clone(), kept.A.clone())
            return kept, lost, total

        found = each(module, fold.new)
        lost, total = sum(lost for _, lost, _ in found.values()), sum(total for _, _, total in found.values())
        self.report = FoldReport(
            alpha.used,
            alpha.raw,
            sqrt(lost / total) if total > 0 else 0.0,
            {name: sqrt(lost / total) if total > 0 else 0.0 for name, (_, lost, total) in found.items()},
            max(kept.rank for kept, _, _ in found.values()),
            self.rule.curvature_errors(),
        )
        self.tasks += 1
        return {name: kept for name, (kept, _, _) in found.items()}

    def _truncated(self, name: str, x: LowRank, rank: int) -> tuple[LowRank, float, float]:
        """At most `max_rank` of a module, and the squared Frobenius norms of what was cut and of the whole; where
        the task's `rank` does not need more, at most what a matrix of its shape can have, which cuts nothing."""
        full = max(min(x.shape), rank)
        limit = full if self.max_rank is None else min(full, self.max_rank)
        if x.rank <= limit:
            return x, 0.0, lowrank.inner(x, x)
        if limit == full:
            return lowrank.truncate(x, full)[0], 0.0, lowrank.inner(x, x)
        weights = self.rule.weights(name) if self.truncation == "fisher" else None
        if weights is None or not all(w.max() > 0 for w in weights):
            return lowrank.truncate(x, limit)
        # a row that no task cares for keeps a little weight, or what it holds would be lost to rounding
        kept, _, _ = lowrank.truncate(x, limit, *((w / w.max()).clamp(min=1e-6).sqrt() for w in weights))
        change = lowrank.add(x, kept.scale(-1.0))
        return kept, max(0.0, lowrank.inner(change, change)), lowrank.inner(x, x)

    def state(self) -> dict[str, Tensor]:
        """Tensors to go on from; :attr:`tasks` is the other half."""
        return self.rule.state()

    def load_state(self, state: dict[str, Tensor], tasks: int) -> None:
        """Go on after `tasks` folds."""
        self.rule.load_state(state)
        self.tasks = tasks
