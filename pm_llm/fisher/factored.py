"""Factored: the row sums and the column sums of the diagonal Fisher. No d_out x d_in matrix anywhere.

For one example with inputs `x` (T, d_in) and output gradients `g` (T, d_out) the gradient is `G = g' x`, and

    row sums of G o G    = diag(g' (x x') g)        column sums of G o G = diag(x' (g g') x)

cost O(T^2 (d_in + d_out)) through the T x T matrices of inner products. With r and c their means over examples, the
Fisher is taken as `F ~ r c' / sum(r)`, the matrix of rank one with these sums (as Adafactor does, arXiv 1804.04235).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pm_llm import lowrank
from pm_llm.accumulators import Zeros
from pm_llm.fisher import Diagonal, Layer, Past, Penalty, Room
from pm_llm.lowrank import LowRank


class FactoredPast(Past):
    """`S = sum_k r_k c_k' / sum(r_k)` with at most `pairs` pairs, and m as a low-rank matrix of at most rank `rank`.

    One pair too many: the two are joined whose sum is changed least by it. Their row and column sums are added, which
    is the factored Fisher of both tasks' examples together. What that adds to S is added to m, times M, so that the
    slope `S M - m` stays what it was at the merged model M (before `max_rank` cuts it), where the next task begins.
    The rank of m is cut where it matters least to the coefficient: with rows and columns weighted by the inverse roots
    of S's row and column sums r and c. What was cut then changes `<m, Delta>` by no more than its norm times `<(r c')
    o Delta, Delta>^(1/2)`.
    """

    names = ("r", "c", "mB", "mA")

    def __init__(self, r: Tensor, c: Tensor, mB: Tensor, mA: Tensor) -> None:
        self.r, self.c, self.m = r, c, LowRank(mB, mA)  # r (pairs, d_out), c (pairs, d_in)
        self._errors = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def plus(cls, past: Any, fisher: Any, theta: LowRank, room: Room, at: LowRank | None = None) -> FactoredPast:
        m = fisher.times(theta)
        r, c = fisher.r[None], fisher.c[None]
        if past is not None:
            r, c, m = torch.cat([past.r, r]), torch.cat([past.c, c]), lowrank.add(past.m, m)
        if len(r) > room.pairs:
            two, r, c, lost_S, total_S = _joined(r, c)
            at = theta if at is None else at
            m = lowrank.add(m, Factored(r[-1], c[-1]).times(at), *(one.times(at).scale(-1.0) for one in two))
        else:
            lost_S = total_S = 0.0
        m, lost_m, total_m = lowrank.truncate(m, room.rank, inverse_root(r.sum(0)), inverse_root(c.sum(0)))
        made = cls(r, c, m.B, m.A)
        made._errors = (lost_S, total_S, lost_m, total_m)
        return made

    def _each(self) -> list[Factored]:
        return [Factored(r, c) for r, c in zip(self.r, self.c, strict=True)]

    def along(self, delta: LowRank) -> float:
        return sum(one.inner(delta, delta) for one in self._each())

    def pull(self, running: LowRank, delta: LowRank) -> float:
        return lowrank.inner(self.m, delta) - sum(one.inner(running, delta) for one in self._each())

    def penalty(self, running: LowRank) -> Penalty:
        slope = lowrank.add(self.m.scale(-1.0), *(one.times(running) for one in self._each()))
        r, c = self.r, self.c / self.c.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

        def of(live: LowRank) -> Tensor:
            nonlocal r, c, slope
            r, c = r.to(live.B.device), c.to(live.B.device)
            slope = LowRank(slope.B.to(live.B.device), slope.A.to(live.B.device))
            left = torch.einsum("or,ko,os->krs", live.B, r, live.B)
            right = torch.einsum("ri,ki,si->krs", live.A, c, live.A)
            return (left * right).sum() / 2 + ((slope.B.T @ live.B) * (slope.A @ live.A.T)).sum()

        return of

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.r.sum(0), self.c.sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return {"r": self.r, "c": self.c, "mB": self.m.B, "mA": self.m.A}

    def errors(self) -> tuple[float, float, float, float]:
        return self._errors


class Factored(Diagonal):
    """`r` (d_out) are the row sums of the Fisher, `c` (d_in) its column sums."""

    form = "factored"
    past = FactoredPast

    def __init__(self, r: Tensor, c: Tensor) -> None:
        self.r, self.c = r, c

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        d_out, d_in = layer.shape
        like = layer.factors.B  # small: they stay where the model is until all rows are seen
        return {"r": like.new_zeros(d_out), "c": like.new_zeros(d_in)}

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        # sums of squares, which rounding may take below zero where they nearly vanish
        sums["r"] += (g * (x @ x.mT @ g)).sum(dim=1).clamp(min=0).sum(dim=0)
        sums["c"] += (x * (g @ g.mT @ x)).sum(dim=1).clamp(min=0).sum(dim=0)

    def divided(self, size: float) -> Factored:
        return self if size == 1 else Factored(self.r / size, self.c / size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        total = self.trace()
        return lowrank.inner(x, y, self.r, self.c) / total if total > 0 else 0.0

    def times(self, x: LowRank) -> LowRank:
        """`F o x = (diag(r) B) (A diag(c)) / sum(r)`, of the same rank."""
        total = self.trace()
        return LowRank(self.r[:, None] * x.B, x.A * (self.c / total if total > 0 else 0 * self.c))

    def trace(self) -> float:
        return float(self.r.double().sum())

    def count(self) -> int:
        return self.r.numel() * self.c.numel()


def _joined(r: Tensor, c: Tensor) -> tuple[list[Factored], Tensor, Tensor, float, float]:
    """The two pairs that are joined, all with their sum as the last; the squared norms of what that changes in S, and
    of S."""
    whole = _sum_of_pairs(r, c)
    tried = []
    for i, j in combinations(range(len(r)), 2):
        two, one = _sum_of_pairs(r[[i, j]], c[[i, j]]), _sum_of_pairs(r[[i]] + r[[j]], c[[i]] + c[[j]])
        change = lowrank.add(two, one.scale(-1.0))
        tried.append((max(0.0, lowrank.inner(change, change)), i, j))
    lost, i, j = min(tried)
    taken, others = [Factored(r[k], c[k]) for k in (i, j)], [k for k in range(len(r)) if k not in (i, j)]
    r = torch.cat([r[others], r[[i]] + r[[j]]])
    c = torch.cat([c[others], c[[i]] + c[[j]]])
    return taken, r, c, lost, lowrank.inner(whole, whole)


def _sum_of_pairs(r: Tensor, c: Tensor) -> LowRank:
    total = r.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return LowRank(r.T / total, c)


def inverse_root(sums: Tensor) -> Tensor:
    """1 / sqrt, bounded where a row or column has no curvature (there m is zero too)."""
    largest = sums.max()
    return (sums / largest if largest > 0 else torch.ones_like(sums)).clamp(min=1e-12).rsqrt()
