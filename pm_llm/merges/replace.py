"""Replace: the model right after training becomes the running one. With `start: continue` this is SeqLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.merges import Coefficients, Factors, Fold, Merge


@dataclass
class Replace(Merge):
    """`M_t = theta*_t`."""

    def fold(self, fold: Fold) -> tuple[Factors, Coefficients]:
        return fold.theta, Coefficients.same(1.0, fold.theta)
