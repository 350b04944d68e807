"""Factored: the row sums and the column sums of the diagonal Fisher. No d_out x d_in matrix anywhere.

For one example with inputs `x` (T, d_in) and output gradients `g` (T, d_out) the gradient is `G = g' x`, and

    row sums of G o G    = diag(g' (x x') g)        column sums of G o G = diag(x' (g g') x)

cost O(T^2 (d_in + d_out)) through the T x T matrices of inner products. With r and c their means over examples, the
Fisher is taken as `F ~ r c' / sum(r)`, the matrix of rank one with these sums (as Adafactor does, arXiv 1804.04235).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Diagonal, Layer, Room
from pm_llm.fisher.terms import TINY, Terms, TermsPast, Watched
from pm_llm.system.mapped import Zeros


class Pairs(Terms):
    """`S_k = r_k c_k' / sum(r_k)`: the diagonals of R_k and C_k are all there is of them."""

    names = ("r", "c")

    def __init__(self, r: Tensor, c: Tensor) -> None:
        self.r, self.c = r, c  # (terms, d_out), (terms, d_in)

    @classmethod
    def first(cls, fisher: Factored) -> Pairs:
        """A task's alone."""
        return cls(fisher.r[None], fisher.c[None])

    def count(self) -> int:
        return len(self.r)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.r, self.c / self.r.sum(1, keepdim=True).clamp(min=TINY)

    def inner(self, x: LowRank, y: LowRank) -> Tensor:
        r, c = (w.double() for w in self._weights())
        left = torch.einsum("or,ko,os->krs", x.B.double(), r, y.B.double())
        return (left * torch.einsum("ri,ki,si->krs", x.A.double(), c, y.A.double())).sum((1, 2))

    def quadratic(self) -> Callable[[Tensor, Tensor], Tensor]:
        r, c = self.r / self.r.sum(-1, keepdim=True).clamp(min=TINY), self.c

        def of(B: Tensor, A: Tensor) -> Tensor:
            left = torch.einsum("...or,...ko,...os->...krs", B, r, B)
            return (left * torch.einsum("...ri,...ki,...si->...krs", A, c, A)).sum()

        return of

    def times(self, x: LowRank) -> LowRank:
        return lowrank.add(*(LowRank(r[:, None] * x.B, x.A * c) for r, c in zip(*self._weights(), strict=True)))

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.r.sum(0), self.c.sum(0)

    def with_task(self, fisher: Factored, room: Room) -> Pairs:
        return Pairs(torch.cat([self.r, fisher.r[None]]), torch.cat([self.c, fisher.c[None]]))

    def likeness(self) -> tuple[Tensor, Tensor, Tensor]:
        r, c = self.r.double(), self.c.double()
        r_hat, c_hat = (x / x.sum(1, keepdim=True).clamp(min=TINY) for x in (r, c))
        return r.sum(1), r_hat @ r_hat.T, c_hat @ c_hat.T

    def joined(self, i: int, j: int, room: Room) -> Pairs:
        t = self.r[[i, j]].sum(1).clamp(min=TINY)
        share = (t.sqrt() / t.sqrt().sum() / t * t.sum())[:, None]
        others = [k for k in range(len(self.r)) if k not in (i, j)]
        return Pairs(*(torch.cat([x[others], (share * x[[i, j]]).sum(0, keepdim=True)]) for x in (self.r, self.c)))

    def tensors(self) -> dict[str, Tensor]:
        return {"r": self.r, "c": self.c}


class FactoredPast(TermsPast):
    """The sum of :class:`Pairs`: `(d_out + d_in)` numbers a term."""

    kind = Pairs
    names = (*Pairs.names, "gB", "gA", *Watched.names)


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
