"""Kronecker: how rows go with rows and columns with columns, and so what a diagonal cannot tell: that a new task's
inputs, or its output gradients, lie where past tasks have none.

For one example with inputs `x` (T, d_in) and output gradients `g` (T, d_out) the gradient is `G = g' x`. With

    R = E[G G'] = E[g' (x x') g]        C = E[G' G] = E[x' (g g') x]

the empirical Fisher is taken as `F ~ R (x) C / tr R`, the product of Shampoo's two moments (arXiv 1802.09568) with the
trace of F; K-FAC (arXiv 1503.05671) takes the moments of g and of x by themselves. Its diagonal is the factored
one. For a low-rank update `B A`

    <F B1 A1, B2 A2> = sum((B1' R B2) o (A1 C A2')) / tr R,

which is 0 where the rows of A1 are orthogonal to all past inputs, whatever the size of its entries. While a task's
rows are seen R and C are whole, `4 (d_in^2 + d_out^2)` bytes a module and process; then their leading directions are
kept, and the diagonal of what is left, which charges unseen directions again.
"""

from __future__ import annotations

from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor

from pm_llm import lowrank
from pm_llm.accumulators import Zeros
from pm_llm.fisher import Diagonal, Layer, Past, Penalty, Room
from pm_llm.fisher.factored import inverse_root
from pm_llm.lowrank import LowRank

TINY = torch.finfo(torch.float32).tiny
MORE, ITERATIONS = 16, 8  # of the subspace iteration: columns besides those that are kept, and turns
BLOCK = 512  # rows of a whole matrix that are widened to float64 at a time


class KroneckerPast(Past):
    """`S = sum_k R_k (x) C_k / tr R_k` with at most `pairs` terms, each side `V' V + diag(d)` with at most
    `directions` rows in V, and m as a low-rank matrix of at most rank `rank`.

    One term too many: the two are joined whose sum is changed least by it; their sides are added, which is the Fisher
    of both tasks' examples together. What that adds to S is added to m, times M, so that the quadratics' slope `S M -
    m` stays what it was at the merged model M (before `max_rank` cuts it), where the next task begins: it is small
    beside S M, and would drown in what was cut. The rank of m is cut as in the factored form.
    """

    names = ("RV", "Rd", "CV", "Cd", "mB", "mA")

    def __init__(self, RV: Tensor, Rd: Tensor, CV: Tensor, Cd: Tensor, mB: Tensor, mA: Tensor) -> None:
        self.R, self.C = Side(RV, Rd), Side(CV, Cd)  # V (terms, directions, d), d (terms, d)
        self.m, self._errors = LowRank(mB, mA), (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def plus(cls, past: Any, fisher: Any, theta: LowRank, room: Room, at: LowRank | None = None) -> KroneckerPast:
        one = fisher.kept(room)
        R, C, lost_S = one.R, one.C, one.lost
        (m,) = _times(R, C, theta)
        if past is not None:
            R, C, m = past.R.with_terms(R), past.C.with_terms(C), lowrank.add(past.m, m)
        traces, rows, columns = R.traces().double().clamp(min=TINY), R.products(), C.products()
        products = rows * columns / (traces[:, None] * traces)  # of the terms; their sum is the squared norm of S
        total_S = float(products.sum())
        if len(R.d) > room.pairs:
            i, j = _least_changed(products, rows, columns, traces)
            two = R.terms([i, j]), C.terms([i, j])
            R, C = R.joined(i, j, room.directions), C.joined(i, j, room.directions)
            made = R.terms([-1]), C.terms([-1])
            lost_S += _changed(*(old.with_terms(new) for old, new in zip(two, made, strict=True)))
            at = theta if at is None else at
            m = lowrank.add(m, *_times(*made, at), *_times(*two, at.scale(-1.0)))
        roots = [inverse_root(side.diagonals().sum(0)) for side in (R, C)]
        m, lost_m, total_m = lowrank.truncate(m, room.rank, *roots)
        found = cls(R.V, R.d, C.V, C.d, m.B, m.A)
        found._errors = (lost_S, total_S, lost_m, total_m)
        return found

    def along(self, delta: LowRank) -> float:
        return _inner(self.R, self.C, delta, delta)

    def pull(self, running: LowRank, delta: LowRank) -> float:
        return lowrank.inner(self.m, delta) - _inner(self.R, self.C, running, delta)

    def penalty(self, running: LowRank) -> Penalty:
        R, C, traces = self.R, self.C, self.R.traces().clamp(min=TINY)
        slope = lowrank.add(self.m.scale(-1.0), *_times(R, C, running))

        def of(live: LowRank) -> Tensor:
            nonlocal R, C, slope, traces
            if R.d.device != live.B.device:
                R, C, traces = R.to(live.B.device), C.to(live.B.device), traces.to(live.B.device)
                slope = LowRank(slope.B.to(live.B.device), slope.A.to(live.B.device))
            each = (R.form(live.B, live.B) * C.form(live.A.T, live.A.T)).sum((1, 2))
            return (each / traces).sum() / 2 + ((slope.B.T @ live.B) * (slope.A @ live.A.T)).sum()

        return of

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.R.diagonals().sum(0), self.C.diagonals().sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return {"RV": self.R.V, "Rd": self.R.d, "CV": self.C.V, "Cd": self.C.d, "mB": self.m.B, "mA": self.m.A}

    def errors(self) -> tuple[float, float, float, float]:
        return self._errors


class Kept(Diagonal):
    """A Kronecker Fisher whose sides are cut, which changes it by the squared Frobenius norm `lost`."""

    form = "kronecker"
    past = KroneckerPast

    def __init__(self, R: Side, C: Side, lost: float) -> None:
        self.R, self.C, self.lost = R, C, lost

    def divided(self, size: float) -> Kept:
        return self if size == 1 else Kept(self.R.divided(size), self.C.divided(size), self.lost / size**2)

    def inner(self, x: LowRank, y: LowRank) -> float:
        return _inner(self.R, self.C, x, y)

    def trace(self) -> float:
        return float(self.C.traces())

    def count(self) -> int:
        return self.R.d.numel() * self.C.d.numel()


class Kronecker(Diagonal):
    """`R` (d_out, d_out) and `C` (d_in, d_in)."""

    form = "kronecker"
    past = KroneckerPast

    def __init__(self, R: Tensor, C: Tensor) -> None:
        self.R, self.C = R, C

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        d_out, d_in = layer.shape
        return {"R": zeros(d_out, d_out), "C": zeros(d_in, d_in)}

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        sums["R"] += (g.flatten(0, 1).T @ (x @ x.mT @ g).flatten(0, 1)).cpu()  # summed over the batch at once
        sums["C"] += (x.flatten(0, 1).T @ (g @ g.mT @ x).flatten(0, 1)).cpu()

    def kept(self, room: Room) -> Kept:
        """Its leading directions. What that changes: `|R|^2 |C|^2 - 2 <R, R'> <C, C'> + |R'|^2 |C'|^2` over tr^2."""
        R, C = Side.of(self.R, room.directions), Side.of(self.C, room.directions)
        before = prod(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in (self.R, self.C))
        lost = before - 2 * R.product_with(self.R) * C.product_with(self.C) + float(R.products() * C.products())
        return Kept(R, C, max(0.0, lost) / max(self.trace(), TINY) ** 2)

    def divided(self, size: float) -> Kronecker:
        return self if size == 1 else Kronecker(self.R / size, self.C / size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        total = self.trace()
        left, right = x.B.double().T @ self.R.double() @ y.B.double(), x.A.double() @ self.C.double() @ y.A.double().T
        return float((left * right).sum()) / total if total > 0 else 0.0

    def trace(self) -> float:
        return float(self.R.double().trace())

    def count(self) -> int:
        return len(self.R) * len(self.C)


class Side:
    """Several matrices `V_k' V_k + diag(d_k)`: V (terms, directions, d), d (terms, d), none of it negative."""

    def __init__(self, V: Tensor, d: Tensor) -> None:
        self.V, self.d = V, d

    @classmethod
    def of(cls, whole: Tensor, directions: int) -> Side:
        """One matrix, (d, d) and positive semidefinite: its leading directions, and the diagonal of the rest.

        Where the matrix is large, by subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4).
        """
        whole = whole.float()
        basis = torch.eye(len(whole))
        if 4 * (directions + MORE) < len(whole):
            basis = torch.randn(len(whole), directions + MORE, generator=torch.Generator().manual_seed(0))
            for _ in range(ITERATIONS):
                basis = torch.linalg.qr(whole @ basis)[0]
        values, vectors = torch.linalg.eigh((basis.T @ (whole @ basis)).double())
        V = (values.clamp(min=0).sqrt() * (basis.double() @ vectors)).T.flip(0)[:directions]
        d = (whole.diagonal() - V.square().sum(0)).clamp(min=0)
        return cls(V[None].float().contiguous(), d[None].float())

    def to(self, where: Any) -> Side:
        """On another device, or in another type."""
        return Side(self.V.to(where), self.d.to(where))

    def terms(self, which: list[int]) -> Side:
        """Those of them."""
        return Side(self.V[which], self.d[which])

    def divided(self, size: float) -> Side:
        return Side(self.V / size**0.5, self.d / size)

    def product_with(self, whole: Tensor) -> float:
        """The inner product of a matrix (d, d) and these, added up, in float64."""
        V = self.V.double().flatten(0, 1)
        found = torch.zeros_like(V)
        for block in torch.arange(len(whole)).split(BLOCK):
            found += V[:, block] @ whole[block].double()
        return float((found * V).sum() + (self.d.double() * whole.diagonal()).sum())

    def form(self, x: Tensor, y: Tensor) -> Tensor:
        """`X' M_k Y` for each k: (terms, n, m) of X (d, n) and Y (d, m)."""
        return (self.V @ x).mT @ (self.V @ y) + x.T @ (self.d[..., None] * y)

    def times(self, x: Tensor) -> Tensor:
        """`M_k X` for each k: (terms, d, n) of X (d, n)."""
        return self.V.mT @ (self.V @ x) + self.d[..., None] * x

    def diagonals(self) -> Tensor:
        """(terms, d)"""
        return self.V.square().sum(1) + self.d

    def traces(self) -> Tensor:
        """(terms)"""
        return self.diagonals().sum(1)

    def products(self) -> Tensor:
        """The matrices' inner products, (terms, terms), in float64."""
        V, d = self.V.double(), self.d.double()
        low = torch.einsum("kad,lbd->klab", V, V).square().sum((2, 3))
        mixed = d @ V.square().sum(1).T
        return low + mixed + mixed.T + d @ d.T

    def with_terms(self, other: Side) -> Side:
        """Those of both; V is filled with zeros where one has fewer directions."""
        most = max(self.V.shape[1], other.V.shape[1])
        filled = [torch.nn.functional.pad(V, (0, 0, 0, most - V.shape[1])) for V in (self.V, other.V)]
        return Side(torch.cat(filled), torch.cat([self.d, other.d]))

    def joined(self, i: int, j: int, directions: int) -> Side:
        """With the sum of the matrices i and j in their place, as the last."""
        _, s, vh = torch.linalg.svd(torch.cat([self.V[i], self.V[j]]).double(), full_matrices=False)
        V, rest = (s[:, None] * vh).tensor_split([directions])
        d = self.d[i] + self.d[j] + rest.square().sum(0).float()
        others = [k for k in range(len(self.d)) if k not in (i, j)]
        return Side(self.V[others], self.d[others]).with_terms(Side(V[None].float(), d[None]))


def _inner(R: Side, C: Side, x: LowRank, y: LowRank) -> float:
    """`sum_k <R_k (x) C_k x, y> / tr R_k` in float64."""
    R, C = R.to(torch.float64), C.to(torch.float64)
    each = (R.form(x.B.double(), y.B.double()) * C.form(x.A.double().T, y.A.double().T)).sum((1, 2))
    return float((each / R.traces().clamp(min=TINY)).sum())


def _times(R: Side, C: Side, x: LowRank) -> list[LowRank]:
    """`R_k (x) C_k x / tr R_k` for each k, of the rank of x."""
    sides = zip(R.times(x.B), C.times(x.A.T), R.traces().clamp(min=TINY), strict=True)
    return [LowRank(b, a.T / trace) for b, a, trace in sides]


def _changed(R: Side, C: Side) -> float:
    """The squared Frobenius norm of the sum of all terms but the last, less the last."""
    traces = R.traces().double().clamp(min=TINY)
    products = R.products() * C.products() / (traces[:, None] * traces)
    sign = torch.ones_like(traces)
    sign[-1] = -1
    return max(0.0, float(sign @ products @ sign))


def _least_changed(products: Tensor, rows: Tensor, columns: Tensor, t: Tensor) -> tuple[int, int]:
    """The two terms whose joining, before the sides of what they become are cut, changes S least.

    Args:
        products: The terms' inner products, (terms, terms).
        rows: Those of their R, and `columns` those of their C.
        t: The terms' traces, (terms).
    """
    tried = []
    for i, j in combinations(range(len(t)), 2):
        two = [i, j]
        before = float(products[two][:, two].sum())
        after = float(rows[two][:, two].sum() * columns[two][:, two].sum() / t[two].sum() ** 2)
        both = float((rows[two].sum(0)[two] * columns[two].sum(0)[two] / t[two]).sum() / t[two].sum())
        tried.append((before + after - 2 * both, i, j))
    return min(tried)[1:]
