"""Task arithmetic: the task vectors are scaled and added up (arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.merges.base import Coefficients, Fold, Merge
from pm_llm.system.options import option


@dataclass
class Arithmetic(Merge):
    """`M_t = M_{t-1} + scale * Delta_t`, so `M_t = scale * sum_i Delta_i`: the first task is scaled too."""

    scale: float = option(1.0, finite=True)
    adds = True

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(float(self.scale), fold.new)
