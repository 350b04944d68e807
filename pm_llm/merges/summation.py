"""Sum: every task vector is added in full. With `start: fresh` this is IncLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class Sum(Merge):
    """`M_t = M_{t-1} + Delta_t`."""

    adds = True

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0, fold.new)
