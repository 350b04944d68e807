"""Kronecker: how rows go with rows and columns with columns, and so what a diagonal cannot tell: that a new task's
inputs, or its output gradients, lie where past tasks have none.

For one example with inputs `x` (T, d_in) and output gradients `g` (T, d_out) the gradient is `G = g' x`. With

    R = E[G G'] = E[g' (x x') g]        C = E[G' G] = E[x' (g g') x]

the empirical Fisher is taken as `F ~ R (x) C / tr R`, the product of Shampoo's two moments (arXiv 1802.09568) with the
trace of F; K-FAC (arXiv 1503.05671) takes the moments of g and of x by themselves. Its diagonal is the factored
one. For a low-rank update `B A`

    <F B1 A1, B2 A2> = sum((B1' R B2) o (A1 C A2')) / tr R,

which is 0 where the rows of A1 are orthogonal to all past inputs, whatever the size of its entries. While a task's
rows are seen R and C are sketched where they are large (:mod:`pm_llm.fisher.moments`); then their leading directions
are kept, and the diagonal of what is left, which charges unseen directions again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher import moments
from pm_llm.fisher.base import Diagonal, Layer, Room
from pm_llm.fisher.sides import Sides
from pm_llm.fisher.terms import TINY, Terms, TermsPast, Watched
from pm_llm.system.mapped import Zeros


class Products(Terms):
    """`S_k = R_k (x) C_k / tr R_k`, the sides in a basis that all tasks share (:mod:`pm_llm.fisher.sides`)."""

    names = ("RU", "RG", "Rd", "CU", "CG", "Cd")

    def __init__(self, RU: Tensor, RG: Tensor, Rd: Tensor, CU: Tensor, CG: Tensor, Cd: Tensor) -> None:
        self.R, self.C = Sides(RU, RG, Rd), Sides(CU, CG, Cd)

    @classmethod
    def of(cls, R: Sides, C: Sides) -> Products:
        """From its two sides."""
        return cls(R.U, R.G, R.d, C.U, C.G, C.d)

    @classmethod
    def first(cls, fisher: Kept) -> Products:
        """A task's alone."""
        return cls.of(fisher.R, fisher.C)

    def count(self) -> int:
        return len(self.R.d)

    def inner(self, x: LowRank, y: LowRank) -> Tensor:
        R, C = self.R.to(torch.float64), self.C.to(torch.float64)
        each = R.form(x.B.double(), y.B.double()) * C.form(x.A.double().T, y.A.double().T)
        return each.sum((1, 2)) / R.traces().clamp(min=TINY)

    def quadratic(self) -> Callable[[Tensor, Tensor], Tensor]:
        R, C = self.R.divided(self.R.traces().clamp(min=TINY)), self.C
        return lambda B, A: (R.form(B, B) * C.form(A.mT, A.mT)).sum()

    def times(self, x: LowRank) -> LowRank:
        sides = zip(self.R.times(x.B), self.C.times(x.A.T), self.R.traces().clamp(min=TINY), strict=True)
        return lowrank.add(*(LowRank(b, a.T / trace) for b, a, trace in sides))

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.R.diagonals().sum(0), self.C.diagonals().sum(0)

    def with_task(self, fisher: Kept, room: Room) -> Products:
        return Products.of(self.R.with_terms(fisher.R, room.basis), self.C.with_terms(fisher.C, room.basis))

    def likeness(self) -> tuple[Tensor, Tensor, Tensor]:
        traces = [side.traces().double().clamp(min=TINY) for side in (self.R, self.C)]
        rows, columns = (side.products() / (t[:, None] * t) for side, t in zip((self.R, self.C), traces, strict=True))
        return traces[0], rows, columns

    def joined(self, i: int, j: int, room: Room) -> Products:
        root = self.R.traces()[[i, j]].clamp(min=TINY).sqrt()
        shares = (root / root.sum() * root.square().sum()).tolist()
        sides = []
        for side in (self.R, self.C):
            t = side.traces()[[i, j]].clamp(min=TINY).tolist()
            sides.append(side.joined(i, j, shares[0] / t[0], shares[1] / t[1], room.directions))
        return Products.of(*sides)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.R.U, self.R.G, self.R.d, self.C.U, self.C.G, self.C.d), strict=True))


class KroneckerPast(TermsPast):
    """The sum of :class:`Products`: `(d_out + d_in) (basis + pairs)` numbers for S, and what is small beside them."""

    kind = Products
    names = (*Products.names, "gB", "gA", *Watched.names)


class Kept(Diagonal):
    """A Kronecker Fisher whose sides are cut to their leading directions; `whole` is what it was."""

    form = "kronecker"
    past = KroneckerPast

    def __init__(self, R: Sides, C: Sides, whole: Kronecker | None = None, size: float = 1.0) -> None:
        self.R, self.C, self.whole, self.size = R, C, whole, size

    def uncut(self) -> Diagonal:
        return self if self.whole is None else _Divided(self.whole, self.size)

    def divided(self, size: float) -> Kept:
        return self if size == 1 else Kept(self.R.divided(size), self.C.divided(size), self.whole, self.size * size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        return float(Products.of(self.R, self.C).inner(x, y))

    def times(self, x: LowRank) -> LowRank:
        """`F o x`, of the same rank."""
        return Products.of(self.R, self.C).times(x)

    def trace(self) -> float:
        return float(self.C.traces())

    def count(self) -> int:
        return self.R.d.numel() * self.C.d.numel()


class _Divided(Diagonal):
    """A Fisher divided by a number, of which only products are wanted: the sides are not copied."""

    def __init__(self, whole: Kronecker, size: float) -> None:
        self.whole, self.size = whole, size

    def inner(self, x: LowRank, y: LowRank) -> float:
        return self.whole.inner(x, y) / self.size


class Kronecker(Diagonal):
    """`R` and `C`, each as :mod:`pm_llm.fisher.moments` holds it: (d, d), or a sketch."""

    form = "kronecker"
    past = KroneckerPast

    def __init__(self, R: Tensor, C: Tensor) -> None:
        self.R, self.C = R, C

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        d_out, d_in = layer.shape
        device = layer.factors.B.device
        return {"R": moments.blank(d_out, device), "C": moments.blank(d_in, device)}

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        moments.add(sums["R"], g, x @ x.mT)
        moments.add(sums["C"], x, g @ g.mT)

    def kept(self, room: Room) -> Kept:
        """Its leading directions, and the diagonal of what is left."""
        return Kept(moments.sides(self.R, room.directions), moments.sides(self.C, room.directions), self)

    def divided(self, size: float) -> Kronecker:
        return self if size == 1 else Kronecker(self.R / size, self.C / size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        total = self.trace()
        left, right = moments.form(self.R, x.B, y.B), moments.form(self.C, x.A.T, y.A.T)
        return float((left * right).sum()) / total if total > 0 else 0.0

    def trace(self) -> float:
        return float(moments.trace(self.R))

    def count(self) -> int:
        return len(self.R) * len(self.C)
