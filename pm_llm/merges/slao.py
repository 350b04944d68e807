"""SLAO: the new A as it is, and B as a running average that moves ever more slowly."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge, check_coordinates


@dataclass
class Slao(Merge):
    """`A_M := A_t`, `B_M := B_M + (B_t - B_M) / sqrt(t)` (SLAO); the coefficient that is told is 1/sqrt(t).

    For an adapter that continues in one rank, as with `start: orthogonal`.

    Raises:
        PmLlmError: If the adapter does not continue, or its rank is not the running one's.
    """

    needs_history = True
    in_factors = True

    def coefficients(self, fold: Fold) -> Coefficients:
        check_coordinates("slao", fold)
        return Coefficients.same(1 / sqrt(fold.task), fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        new = fold.new[name]
        if not fold.running:
            return new
        before = fold.running[name].B
        return LowRank(before + alpha * (new.B - before), new.A)
