"""Orthonormal bases of what past tasks used, and sketches of what a task uses."""

from __future__ import annotations

import torch
from torch import Tensor


def without(x: Tensor, basis: Tensor | None) -> Tensor:
    """The rows of `x` (n, d) less their part in the span of the orthonormal rows of `basis` (k, d)."""
    if basis is None:
        return x
    basis = basis.to(x)
    return x - (x @ basis.T) @ basis


def extended(basis: Tensor | None, rows: Tensor, share: float, most: int) -> Tensor:
    """The basis (k, d) with the leading directions of `rows` (n, d) that it lacks, so that it holds `share` of their
    squared norm, in at most `most` rows. That is the memory of gradient projection (GPM, arXiv 2103.09762)."""
    rows = rows.double()
    _, s, vh = torch.linalg.svd(without(rows, basis), full_matrices=False)
    return _joined(basis, s.square(), vh, float(rows.square().sum()), share, most)


def extended_by_moments(basis: Tensor | None, moments: Tensor, share: float, most: int) -> Tensor:
    """The same for rows that are given by their second moments X'X (d, d)."""
    energies, directions = leading(moments, basis)
    return _joined(basis, energies, directions, float(moments.double().trace()), share, most)


def leading(moments: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of second moments (d, d), off a basis: the squared norms along their principal directions, the largest first,
    and these directions, as orthonormal rows (d, d)."""
    projected = without(without(moments.double(), basis).T, basis)
    energies, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return energies.flip(0).clamp(min=0), vectors.T.flip(0)


def _joined(
    basis: Tensor | None, energies: Tensor, directions: Tensor, total: float, share: float, most: int
) -> Tensor:
    held = total - float(energies.sum())
    count = 0
    while count < len(energies) and held < share * total and energies[count] > 1e-14 * energies[0]:
        held += float(energies[count])
        count += 1
    new = directions[: max(0, min(count, most - (0 if basis is None else len(basis))))]
    whole = new if basis is None else torch.cat([basis.to(new), new])
    found: Tensor = torch.linalg.qr(whole.T)[0].T.float().contiguous()
    return found


class Sketch:
    """A matrix `size` x d that stands for a long one whose rows come one after another (Frequent Directions,
    arXiv 1501.01711): `||X'X - S'S||_2 <= ||X - X_k||_F^2 / (size - k)` for all k < size, X_k the best of rank k."""

    def __init__(self, size: int, rows: Tensor | None = None) -> None:
        self.size, self.rows = size, rows

    def add(self, x: Tensor) -> None:
        """Take in the rows of `x` (n, d)."""
        stacked = x if self.rows is None else torch.cat([self.rows.to(x), x])
        if len(stacked) > 2 * self.size:
            _, s, vh = torch.linalg.svd(stacked, full_matrices=False)
            least = s[self.size].square() if len(s) > self.size else torch.zeros_like(s[0])
            kept = (s[: self.size].square() - least).clamp(min=0).sqrt()
            stacked = kept[:, None] * vh[: self.size]
        self.rows = stacked
