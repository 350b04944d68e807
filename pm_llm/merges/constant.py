"""Constant: the same given coefficient for every task after the first."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge, check_coordinates, entrywise
from pm_llm.system.options import option


@dataclass
class Constant(Merge):
    """`M_t = M_{t-1} + coefficient * Delta_t`; the first task, which has nothing to join, is taken whole.

    `space: factors` averages A and B themselves, of an adapter that continues: the rank stays what it is.
    """

    coefficient: float = option(0.5, finite=True)
    space: str = option("weights", choices=("weights", "factors"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_factors = self.space == "factors"

    def coefficients(self, fold: Fold) -> Coefficients:
        if self.in_factors:
            check_coordinates("constant", fold)
        return Coefficients.same(float(self.coefficient) if fold.running else 1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return entrywise(fold, name, alpha) if self.in_factors else super().merge(fold, name, alpha)
