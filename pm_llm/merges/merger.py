"""Folding a new adapter into the running one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pm_llm.adapters.adapter import Adapter, check_same_place
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.merges.base import Fold, Merge, Trained
from pm_llm.methods import Choice
from pm_llm.system.mapped import Zeros
from pm_llm.system.parallel import each


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
        zeros: Where to put results, see :mod:`pm_llm.system.mapped`; by default in memory.
        options: Options of the rule, e.g. `granularity="module"`.
    """

    def __init__(
        self,
        rule: str | dict[str, Any] | Choice | Merge,
        max_rank: int | None = None,
        truncation: str = "plain",
        zeros: Zeros | None = None,
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
        if truncation == "fisher" and not self.rule.weighs:
            raise PmLlmError(
                f"truncation fisher needs a merge that keeps a Fisher of the weights; {type(self.rule).__name__} does "
                "not."
            )
        self.max_rank, self.truncation, self.zeros = max_rank, truncation, zeros
        self.tasks = 0
        self.report = FoldReport()

    def fold(
        self,
        running: Adapter | str | Path | None,
        new: Adapter | str | Path,
        fisher: Fisher | Mapping[str, Tensor] | None = None,
        trained: Trained | None = None,
    ) -> Adapter:
        """The new running adapter; :attr:`report` says what was done. Modules are worked on one by one, in parallel.

        Args:
            running: The merged adapter of the tasks so far (or its folder); None before the first task.
            new: The adapter just trained (or its folder).
            fisher: The task's Fisher, for rules that need it; tensors are dense Fishers, (d_out, d_in).
            trained: How `new` was trained; by default on top of the frozen running adapter. An adapter that was
                trained on and on, as plain fine-tuning does, is `Trained(stands_on="base")`.

        Raises:
            PmLlmError: If the adapters do not belong together, cannot be folded exactly, or a Fisher is missing.
        """
        running = Adapter.load(running) if isinstance(running, (str, Path)) else running
        new = Adapter.load(new) if isinstance(new, (str, Path)) else new
        trained = trained or Trained()
        self._check(running, new, fisher, trained)
        new = new if running is None else new.beside(running)
        fold = Fold(
            self.tasks + 1,
            running.factors if running is not None else {},
            new.factors,
            None if fisher is None else Fisher.of(fisher),
            trained,
        )
        before = self.rule.state_dict()
        try:
            return new.replace_factors(self._folded(fold))
        except BaseException:  # the same fold may be tried again
            self.rule.load_state_dict(before)
            raise

    def _check(self, running: Adapter | None, new: Adapter, fisher: Any, trained: Trained) -> None:
        """Raise PmLlmError if the adapters do not belong together, or the rule lacks something."""
        rule = f"merge rule {type(self.rule).__name__}"
        for which, adapter in (("running", running), ("new", new)):
            if adapter is not None:
                adapter.check_finite(which)
        if running is not None:
            check_same_place(running, new)
        if self.rule.needs.fisher and fisher is None:
            raise PmLlmError(f"{rule} needs the task's Fisher; give fisher=...")
        if self.rule.needs.probe and running is not None and trained.probe is None:
            raise PmLlmError(f"{rule} looks at the task's loss; give trained=Trained(probe=...).")
        if running is not None and self.rule.needs_history and self.tasks == 0:
            raise PmLlmError(
                f"{rule} has folded no task yet but got a running adapter. Fold the first task with running=None, or "
                "call load_state_dict with what an earlier Merger left."
            )

    def _folded(self, fold: Fold) -> dict[str, LowRank]:
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
            if self.zeros is not None:
                kept = LowRank(self.zeros(*kept.B.shape).copy_(kept.B), self.zeros(*kept.A.shape).copy_(kept.A))
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
        """A module cut to `max_rank`, with the squared Frobenius norms of what was cut and of the whole.

        Factors that are larger than the matrix's own rank, or than the task's `rank`, are always made smaller: that
        loses nothing.
        """
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

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to go on from; :attr:`tasks` is the other half."""
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], tasks: int) -> None:
        """Go on after `tasks` folds."""
        self.rule.load_state_dict(state)
        self.tasks = tasks
