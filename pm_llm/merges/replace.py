"""Replace: the model right after training becomes the running one. With `start: continue` this is SeqLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class Replace(Merge):
    """`M_t = theta*_t`."""

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return fold.theta(name)
