"""Sum: every task vector is added in full. With `start: fresh` this is IncLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm import lowrank
from pm_llm.lowrank import LowRank
from pm_llm.merges import Coefficients, Fold, Merge


@dataclass
class Sum(Merge):
    """`M_t = M_{t-1} + Delta_t`."""

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        update = fold.vector(name).scale(alpha)
        return lowrank.add(fold.running[name], update) if fold.running else update
