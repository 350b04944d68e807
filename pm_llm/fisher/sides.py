"""One side of several Kronecker products: matrices (d, d) by their leading directions, in a basis that they share.

    M_k = U' G_k' G_k U + diag(d_k)

with `U` (basis, d) orthonormal rows, `G_k` (directions, basis) and `d_k` (d), none of it negative. A task brings its
own leading directions; what tasks have in common is in the basis once, so that many tasks have room in it. Where it is
full, those directions stay that hold most of the matrices, each divided by its trace: a small task counts as much as a
large one. Of what is cut, `V' V`, the diagonal is added to `d_k`: the trace stays, and unseen directions are charged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
MORE, ITERATIONS = 16, 8  # of the subspace iteration: columns besides those that are kept, and turns


class Sides:
    """Several such matrices: U (basis, d), G (terms, directions, basis), d (terms, d).

    :meth:`divided`, :meth:`form` and :meth:`traces` take those of several modules stacked, too.
    """

    def __init__(self, U: Tensor, G: Tensor, d: Tensor) -> None:
        self.U, self.G, self.d = U, G, d

    @classmethod
    def of(cls, whole: Tensor, directions: int) -> Sides:
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
        U = (basis.double() @ vectors).T.flip(0)[:directions]
        sizes = values.flip(0)[:directions].clamp(min=0)
        d = (whole.diagonal() - (sizes[:, None] * U.square()).sum(0)).clamp(min=0)
        return cls(U.float().contiguous(), sizes.sqrt().diag()[None].float(), d[None].float())

    def to(self, where: Any) -> Sides:
        """On another device, or in another type."""
        return Sides(self.U.to(where), self.G.to(where), self.d.to(where))

    def divided(self, size: Tensor | float) -> Sides:
        """The matrices divided by a number, or each by its own (terms)."""
        size = torch.as_tensor(size, device=self.d.device)
        return Sides(self.U, self.G / size.sqrt()[..., None, None], self.d / size[..., None])

    def form(self, x: Tensor, y: Tensor) -> Tensor:
        """`X' M_k Y` for each k: (terms, n, m) of X (d, n) and Y (d, m)."""
        left, right = ((self.U @ z).unsqueeze(-3) for z in (x, y))
        rest = x.mT.unsqueeze(-3) @ (self.d[..., None] * y.unsqueeze(-3))
        return (self.G @ left).mT @ (self.G @ right) + rest

    def times(self, x: Tensor) -> Tensor:
        """`M_k X` for each k: (terms, d, n) of X (d, n)."""
        return self.U.T @ (self.G.mT @ (self.G @ (self.U @ x))) + self.d[..., None] * x

    def low_diagonals(self) -> Tensor:
        """The diagonals of `U' G_k' G_k U`, (terms, d)."""
        return torch.stack([(G @ self.U).square().sum(0) for G in self.G])

    def diagonals(self) -> Tensor:
        """(terms, d)"""
        return self.low_diagonals() + self.d

    def traces(self) -> Tensor:
        """(terms)"""
        return self.G.square().sum((-2, -1)) + self.d.sum(-1)

    def products(self) -> Tensor:
        """The matrices' inner products, (terms, terms), in float64."""
        G, d = self.G.double(), self.d.double()
        low = torch.einsum("kab,lcb->klac", G, G).square().sum((2, 3))
        mixed = d @ self.low_diagonals().double().T
        return low + mixed + mixed.T + d @ d.T

    def with_terms(self, other: Sides, basis: int) -> Sides:
        """Those of both, in one basis of at most `basis` directions."""
        q, r = torch.linalg.qr(torch.cat([self.U, other.U]).double().T)  # of any rank: both are r' q'
        mine, others = r.T[: len(self.U)], r.T[len(self.U) :]
        most = max(self.G.shape[1], other.G.shape[1])
        G = torch.cat([_rows(self.G.double() @ mine, most), _rows(other.G.double() @ others, most)])
        d = torch.cat([self.d, other.d])
        traces = (G.square().sum((1, 2)) + d.sum(1)).clamp(min=TINY)
        values, E = torch.linalg.eigh(torch.einsum("kab,kac,k->bc", G, G, 1 / traces))
        E = E.flip(1)[:, : min(basis, max(1, int((values > 1e-12 * values[-1]).sum())))]
        kept = G @ E
        cut = torch.stack([((one - seen @ E.T) @ q.T).square().sum(0) for one, seen in zip(G, kept, strict=True)])
        return Sides((q @ E).T.float().contiguous(), kept.float(), d + cut.float())

    def joined(self, i: int, j: int, of_i: float, of_j: float, directions: int) -> Sides:
        """With `of_i M_i + of_j M_j` in the place of both, as the last."""
        both = torch.cat([of_i**0.5 * self.G[i], of_j**0.5 * self.G[j]]).double()
        _, s, vh = torch.linalg.svd(both, full_matrices=False)
        G, rest = (s[:, None] * vh).float().tensor_split([directions])
        d = of_i * self.d[i] + of_j * self.d[j] + (rest @ self.U).square().sum(0)
        others = [k for k in range(len(self.d)) if k not in (i, j)]
        most = max(self.G.shape[1], len(G))
        return Sides(
            self.U,
            torch.cat([_rows(self.G[others], most), _rows(G[None], most)]),
            torch.cat([self.d[others], d[None]]),
        )


def _rows(G: Tensor, most: int) -> Tensor:
    """Filled with rows of zeros."""
    return torch.nn.functional.pad(G, (0, 0, 0, most - G.shape[1]))
