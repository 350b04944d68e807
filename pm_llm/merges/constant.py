"""Constant: the same given coefficient for every task after the first."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from pm_llm.errors import PmLlmError
from pm_llm.merges import Coefficients, Fold, Merge


@dataclass
class Constant(Merge):
    """`M_t = M_{t-1} + coefficient * Delta_t`; the first task, which has nothing to join, is taken whole."""

    coefficient: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.coefficient, (int, float)) or not isfinite(self.coefficient):
            raise PmLlmError(f"the coefficient is {self.coefficient!r}; it must be a finite number.")

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(float(self.coefficient) if fold.running else 1.0, fold.new)
