"""Task arithmetic: the task vectors are scaled and added up (arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.errors import check_number
from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class Arithmetic(Merge):
    """`M_t = M_{t-1} + scale * Delta_t`, so `M_t = scale * sum_i Delta_i`: the first task is scaled too."""

    scale: float = 1.0
    adds = True

    def __post_init__(self) -> None:
        check_number("task_arithmetic: scale", self.scale)

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(float(self.scale), fold.new)
