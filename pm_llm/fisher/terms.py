"""The past's quadratics as a bounded number of terms, one a task, and their slope at the merged model.

    Q(M + Delta) - Q(M) = 1/2 <S o Delta, Delta> + <g, Delta>,
    S = sum_k S_k,   g = S o M - m = sum_k S_k o (M - theta_k)

The slope g is kept, not m: it is a small difference of two large matrices, which a matrix of bounded rank holds well
where it would be lost in the same cut of m. It follows the model: where M moves by D, g moves by `S o D`.

Each task is a term of its own until there are `pairs` of them. Then two are joined, those that keep most of each
other's quadratic, relative to their own size: a small task must not vanish beside a large one. With traces t_1 and
t_2, sides `R_k` and `C_k` divided by their traces, and `a = sqrt t_1 / (sqrt t_1 + sqrt t_2)`,

    S_12 = (t_1 + t_2) (a R_1 + (1 - a) R_2) (x) (a C_1 + (1 - a) C_2).

Equal shapes are joined exactly. Of two that have nothing in common each keeps at least half of itself then, whatever
their sizes, where adding up the sides (the Fisher of both tasks' examples together) would leave t_1 / (t_1 + t_2) of
the first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Past, Penalties, Penalty, Room
from pm_llm.fisher.together import Together

TINY = torch.finfo(torch.float32).tiny
ROUNDING = 1e-6  # a difference's singular values below this share of the matrices' norm are rounding


class Terms:
    """Some `S_k = R_k (x) C_k / tr R_k`, one a task or several joined."""

    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def count(self) -> int:
        """How many."""

    @abstractmethod
    def inner(self, x: LowRank, y: LowRank) -> Tensor:
        """`<S_k o x, y>` of each, (terms), in float64."""

    @abstractmethod
    def quadratic(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`<S o x, x>` of all together as a function of (B, A) of x, a gradient goes through it. Tensors of several
        modules may be stacked: then it is the sum over modules."""

    @abstractmethod
    def times(self, x: LowRank) -> LowRank:
        """`S o x` of all together."""

    @abstractmethod
    def sums(self) -> tuple[Tensor, Tensor]:
        """The row sums (d_out) and column sums (d_in) of the diagonal of S."""

    @abstractmethod
    def with_task(self, fisher: Any, room: Room) -> Terms:
        """With a task's Fisher, cut to what is kept of it, as one term more, the last."""

    @abstractmethod
    def likeness(self) -> tuple[Tensor, Tensor, Tensor]:
        """The traces t (terms), and the inner products of the R_k / t_k and of the C_k / t_k, (terms, terms);
        float64."""

    @abstractmethod
    def joined(self, i: int, j: int, room: Room) -> Terms:
        """With the terms i and j as one, the last."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """By name."""


class Watched:
    """A vector of each term, along which is known what the quadratics were before anything was cut or joined.

    It is the task vector at rank `WIDTH`; of two terms that are joined, that along which less is kept.
    """

    WIDTH = 2
    names = ("ownB", "ownA", "own")

    def __init__(self, ownB: Tensor, ownA: Tensor, own: Tensor) -> None:
        self.B, self.A, self.exact = ownB, ownA, own  # (terms, d_out, WIDTH), (terms, WIDTH, d_in), (terms)

    def vectors(self) -> list[LowRank]:
        """As matrices."""
        return [LowRank(b, a) for b, a in zip(self.B, self.A, strict=True)]

    def with_task(self, fisher: Any, vector: LowRank, before: Terms | None) -> Watched:
        """One more, and the new Fisher's quadratic along all of them, with nothing cut from it."""
        x = lowrank.truncate(vector, self.WIDTH)[0]
        pad = self.WIDTH - x.rank
        x = LowRank(torch.nn.functional.pad(x.B, (0, pad)), torch.nn.functional.pad(x.A, (0, 0, 0, pad)))
        known = float(before.inner(x, x).sum()) if before is not None else 0.0
        every = [*self.vectors(), x]
        exact = torch.cat([self.exact.double(), torch.tensor([known], dtype=torch.float64)])
        exact = exact + torch.tensor([fisher.uncut().inner(one, one) for one in every], dtype=torch.float64)
        return Watched(torch.cat([self.B, x.B[None]]), torch.cat([self.A, x.A[None]]), exact)

    def joined(self, i: int, j: int, terms: Terms) -> Watched:
        """For the terms of :meth:`Terms.joined`, which are given."""
        left = {
            k: float(terms.inner(x, x).sum() / self.exact[k]) if self.exact[k] > 0 else float("inf")
            for k, x in enumerate(self.vectors())
            if k in (i, j)
        }
        kept = min(left, key=left.__getitem__)
        order = [k for k in range(len(self.exact)) if k not in (i, j)] + [kept]
        return Watched(self.B[order], self.A[order], self.exact[order])

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"ownB": self.B, "ownA": self.A, "own": self.exact.float()}


class TermsPast(Past):
    """S as :class:`Terms`, g as a low-rank matrix of at most rank `rank`; each form names its kind of terms.

    The rank of g is cut where it matters least to the coefficient: with rows and columns weighted by the inverse roots
    of S's row and column sums r and c. What was cut then changes `<g, Delta>` by no more than its norm times `<(r c')
    o Delta, Delta>^(1/2)`.
    """

    kind: ClassVar[Callable[..., Terms]]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, gB: Tensor, gA: Tensor, ownB: Tensor, ownA: Tensor, own: Tensor, **terms: Tensor) -> None:
        self.terms, self.g = type(self).kind(**terms), LowRank(gB, gA)
        self.watched = Watched(ownB, ownA, own)
        self._cut = (0.0, 0.0)

    @classmethod
    def plus(
        cls,
        past: Any,
        fisher: Any,
        theta: LowRank,
        room: Room,
        at: LowRank | None = None,
        before: LowRank | None = None,
    ) -> TermsPast:
        at, fisher = theta if at is None else at, fisher.kept(room)
        vector = theta if before is None else _change(theta, before)
        gap = fisher.times(_change(at, theta))
        if past is None:
            terms = cls.kind.first(fisher)  # type: ignore[attr-defined]
            nothing = (
                theta.B.new_zeros(0, len(theta.B), Watched.WIDTH),
                theta.A.new_zeros(0, Watched.WIDTH, theta.shape[1]),
            )
            watched = Watched(*nothing, torch.zeros(0)).with_task(fisher, vector, None)
            g = gap
        else:
            watched = past.watched.with_task(fisher, vector, past.terms)
            g = lowrank.add(past.g, gap)
            if before is not None:
                g = lowrank.add(g, past.terms.times(_change(at, before)))
            terms = past.terms.with_task(fisher, room)
            if terms.count() > room.pairs:
                traces, rows, columns = terms.likeness()
                i, j = most_alike(traces, rows, columns)
                terms = terms.joined(i, j, room)
                watched = watched.joined(i, j, terms)
        found = cls(g.B, g.A, **watched.tensors(), **terms.tensors())
        found._set_slope(g, room)
        return found

    def moved(self, change: LowRank, room: Room) -> None:
        self._set_slope(lowrank.add(self.g, self.terms.times(change)), room)

    def _set_slope(self, g: LowRank, room: Room) -> None:
        g, lost, whole = lowrank.truncate(g, room.rank, *map(inverse_root, self.terms.sums()))
        self.g, self._cut = g, (self._cut[0] + lost, max(self._cut[1], whole))

    def along(self, delta: LowRank) -> float:
        return float(self.terms.inner(delta, delta).sum())

    def pull(self, running: LowRank, delta: LowRank) -> float:
        return -lowrank.inner(self.g, delta)

    def penalty(self, running: LowRank) -> Penalty:
        together = Together({"": self})
        return lambda live: together({"": live})[0]

    @classmethod
    def penalties(cls, pasts: Mapping[str, Any], running: Mapping[str, LowRank]) -> Penalties:
        return Together(pasts)

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.terms.sums()

    def tensors(self) -> dict[str, Tensor]:
        return {"gB": self.g.B, "gA": self.g.A, **self.watched.tensors(), **self.terms.tensors()}

    def kept_along(self) -> tuple[list[float], list[float]]:
        vectors = self.watched.vectors()
        return [self.along(x) for x in vectors], self.watched.exact.tolist()

    def slope_cut(self) -> tuple[float, float]:
        return self._cut


def most_alike(t: Tensor, rows: Tensor, columns: Tensor) -> tuple[int, int]:
    """The two terms of which, joined, the one that fares worse keeps its own quadratic best.

    How far a term's own part of S moves: `|<S_12 - S_1 - S_2, S_1>| / <S_1 + S_2, S_1>`.

    Args:
        t: Traces (terms).
        rows: Inner products of the R_k, each of trace 1, (terms, terms).
        columns: Those of the C_k.
    """
    root = t.clamp(min=TINY).sqrt()
    a = root[:, None] / (root[:, None] + root)  # of the row's term
    both = t[:, None] + t
    own_rows, own_columns = (a * x.diagonal()[:, None] + (1 - a) * x for x in (rows, columns))
    joined = both * own_rows * own_columns  # <S_12, S_1> / t_1
    apart = t[:, None] * (rows * columns).diagonal()[:, None] + t * rows * columns
    moved = (joined - apart).abs() / apart.clamp(min=TINY)
    worst = torch.maximum(moved, moved.T) + torch.full_like(moved, float("inf")).tril()
    i, j = divmod(int(worst.argmin()), len(t))
    return i, j


def _change(x: LowRank, y: LowRank) -> LowRank:
    """`x - y` of two low-rank matrices that share most of their parts, of the rank that it has."""
    size = max(lowrank.inner(x, x), lowrank.inner(y, y)) ** 0.5
    return lowrank.without_small(lowrank.add(x, y.scale(-1.0)), ROUNDING * size)


def inverse_root(sums: Tensor) -> Tensor:
    """1 / sqrt, bounded where a row or column has no curvature (there g is zero too)."""
    largest = sums.max()
    return (sums / largest if largest > 0 else torch.ones_like(sums)).clamp(min=1e-12).rsqrt()
