"""PAM: the running and the new adapter are averaged, entry by entry of A and of B (arXiv 2506.03189)."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge, check_coordinates, entrywise
from pm_llm.system.options import option


@dataclass
class Pam(Merge):
    """`A_M += w (A_t - A_M)`, `B_M += w (B_t - B_M)`, for an adapter that continues.

    Args:
        weight: `half`: w = 1/2; `count`: w = 1/t, the mean over all tasks. The paper leaves it open (a choice).
    """

    weight: str = option("half", choices=("half", "count"))
    needs_history = True
    in_factors = True

    def coefficients(self, fold: Fold) -> Coefficients:
        check_coordinates("pam", fold)
        half = 0.5 if fold.running else 1.0
        return Coefficients.same(half if self.weight == "half" else 1 / fold.task, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return entrywise(fold, name, alpha)
