"""Average: the running mean of the models right after each task."""

from __future__ import annotations

from dataclasses import dataclass

from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class Average(Merge):
    """`M_t = M_{t-1} + Delta_t / t = mean of theta*_1 ... theta*_t`: what P&M gives when all Fishers are equal."""

    needs_history = True

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0 / fold.task, fold.new)
