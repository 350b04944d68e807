"""Exact algebra on W = B A, without ever forming W (d_out x d_in).

Every function takes and returns :class:`LowRank`; inner products are Frobenius inner products of the products B A.
Inner products and truncation are computed in float64; the factors keep their own type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix `B @ A`, with `B` (d_out, rank) and `A` (rank, d_in). A LoRA scaling is already inside."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are not the factors of one matrix")

    @property
    def rank(self) -> int:
        """Number of columns of B (an upper bound of the matrix rank)."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def scale(self, factor: float) -> LowRank:
        """`factor * B A`; the factor multiplies one side only."""
        return LowRank(self.B * factor, self.A)

    def to(self, device: torch.device | None) -> LowRank:
        """On another device (None: where it is)."""
        return LowRank(self.B.to(device), self.A.to(device))

    def dense(self) -> Tensor:
        """The (d_out, d_in) product, for what has no low-rank form; a module at a time."""
        return self.B @ self.A


def trimmed(x: LowRank) -> LowRank:
    """`x` without what was filled up with zeros at the end of both factors; at least of rank 1."""
    used = ((x.B != 0).any(0) | (x.A != 0).any(1)).nonzero()
    rank = max(1, int(used[-1]) + 1) if len(used) else 1
    return x if rank == x.rank else LowRank(x.B[:, :rank].contiguous(), x.A[:rank].contiguous())


def from_dense(x: Tensor) -> LowRank:
    """A dense (d_out, d_in) matrix as factors of full rank, one of them the identity; for :func:`truncate` to cut."""
    d_out, d_in = x.shape
    return LowRank(torch.eye(d_out, dtype=x.dtype), x) if d_out < d_in else LowRank(x, torch.eye(d_in, dtype=x.dtype))


def add(x: LowRank, *others: LowRank) -> LowRank:
    """`x + y + ...`, exact, of the sum of their ranks: `[B_x | B_y | ...] [A_x ; A_y ; ...]`."""
    for y in others:
        if x.shape != y.shape:
            raise ValueError(f"cannot add matrices of shapes {x.shape} and {y.shape}")
    parts = [x, *others]
    return LowRank(torch.cat([part.B for part in parts], dim=1), torch.cat([part.A for part in parts], dim=0))


def inner(x: LowRank, y: LowRank, rows: Tensor | None = None, columns: Tensor | None = None) -> float:
    """`<x, y> = sum((B_x' B_y) o (A_x A_y'))`, in O((d_out + d_in) rank^2).

    With weights it is `<(rows columns') o x, y> = sum((B_x' diag(rows) B_y) o (A_x diag(columns) A_y'))`.
    """
    left, right = x.B.double(), x.A.double()
    if rows is not None:
        left = left * rows.double()[:, None]
    if columns is not None:
        right = right * columns.double()
    return float(((left.T @ y.B.double()) * (right @ y.A.double().T)).sum())


def truncate(
    x: LowRank, rank: int, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[LowRank, float, float]:
    """The best approximation of at most `rank` (Eckart-Young), by QR of both factors and an SVD of the small core.

    With `B = Q_B R_B` and `A' = Q_A R_A`, `B A = Q_B (R_B R_A') Q_A'`; the core is rank x rank, so the cost is
    O((d_out + d_in) rank^2 + rank^3).

    Args:
        x: The matrix.
        rank: What its rank is cut to.
        rows: Positive weights (d_out); best is then what is nearest with rows so weighted.
        columns: Positive weights (d_in).

    Returns:
        The approximation, the squared Frobenius norm of what was cut, and that of the whole (both weighted).
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if x.rank <= rank:
        return x, 0.0, inner(x, x, None if rows is None else rows**2, None if columns is None else columns**2)
    b, a = x.B.double(), x.A.double()
    b = b if rows is None else b * rows.double()[:, None]
    a = a if columns is None else a * columns.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = (q_b @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_a.T)
    b = b if rows is None else b / rows.double()[:, None]
    a = a if columns is None else a / columns.double()
    return LowRank(b.to(x.B.dtype), a.to(x.A.dtype)), float((s[rank:] ** 2).sum()), float((s**2).sum())


def without_small(x: LowRank, least: float) -> LowRank:
    """`x` without its singular values up to `least`: for sums in which much cancels, and rounding is left."""
    b, a = x.B.double(), x.A.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = max(1, int((s > least).sum()))
    root = s[:rank].sqrt()
    made = LowRank((q_b @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_a.T))
    return LowRank(made.B.to(x.B.dtype), made.A.to(x.A.dtype))
