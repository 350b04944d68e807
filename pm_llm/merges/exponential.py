"""Exponential: an average of the models right after each task in which the old ones fade."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge, check_coordinates, entrywise
from pm_llm.system.options import option


@dataclass
class Exponential(Merge):
    """`M_t = M_{t-1} + alpha_t (theta*_t - M_{t-1})` with `alpha_t = (1 - decay) / (1 - decay^t)`.

    That is the mean of `theta*_1 ... theta*_t` with weights `decay^(t - i)`, which sum to 1 (the correction of Adam's
    averages, arXiv 1412.6980). decay 0: replace; towards 1: average.
    `space: factors` averages A and B themselves, of an adapter that continues: the rank stays what it is.
    """

    decay: float = option(0.5, least=0, below=1)
    space: str = option("weights", choices=("weights", "factors"))
    needs_history = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_factors = self.space == "factors"

    def coefficients(self, fold: Fold) -> Coefficients:
        if self.in_factors:
            check_coordinates("exponential", fold)
        return Coefficients.same((1 - self.decay) / (1 - self.decay**fold.task), fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return entrywise(fold, name, alpha) if self.in_factors else super().merge(fold, name, alpha)
