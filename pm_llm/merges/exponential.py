"""Exponential: an average of the models right after each task in which the old ones fade."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.errors import PmLlmError
from pm_llm.merges import Coefficients, Fold, Merge


@dataclass
class Exponential(Merge):
    """`M_t = M_{t-1} + alpha_t (theta*_t - M_{t-1})` with `alpha_t = (1 - decay) / (1 - decay^t)`.

    That is the mean of `theta*_1 ... theta*_t` with weights `decay^(t - i)`, which sum to 1 (the correction of Adam's
    averages, arXiv 1412.6980). decay 0: replace; towards 1: average.
    """

    decay: float = 0.5
    needs_history = True

    def __post_init__(self) -> None:
        if not isinstance(self.decay, (int, float)) or not 0 <= self.decay < 1:
            raise PmLlmError(f"exponential: decay is {self.decay!r}; it must be a number from 0 to below 1.")

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same((1 - self.decay) / (1 - self.decay**fold.task), fold.new)
