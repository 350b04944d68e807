"""MagMax: of all tasks, each entry takes the value that went furthest (arXiv 2407.06322)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pm_llm.algebra.lowrank import LowRank, from_dense
from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class MagMax(Merge):
    """`M_t = theta*_t` where `|theta*_t| > |M_{t-1}|`, else `M_{t-1}`, entry by entry.

    The task vectors are relative to the base, as in the paper, whose training goes on from the last task
    (`start: last`). Taken task by task it is the maximum over all tasks, up to what `max_rank` cuts from a matrix that
    is of full rank; the error is told.
    """

    dense = True

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        theta = fold.theta(name)
        if not fold.running:
            return theta
        new, before = theta.dense(), fold.running[name].dense()
        return from_dense(torch.where(new.abs() > before.abs(), new, before))
