"""A side's second moments `M = sum_i g_i' K_i g_i` while rows are seen: whole where that is small, else as a sketch.

The sketch is `Y = M O` with a fixed O (d, COLUMNS) of orthonormal columns, and the diagonal of M beside it: one tensor
(d, COLUMNS + 1), of which sums over rows and processes are sums. No (d, d) matrix is ever made. Then

    M ~ Y (O' Y)^-1 Y'

is the Nystroem approximation, made stable by a small shift (Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736,
algorithm 3); what it leaves of the diagonal is kept as a diagonal.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.fisher.sides import Sides

COLUMNS = 128
EPSILON = torch.finfo(torch.float32).eps


def blank(d: int, device: torch.device) -> Tensor:
    """Of no row yet."""
    return torch.zeros(d, size(d) // d, device=device)


def size(d: int) -> int:
    """How many numbers the moments of width d take."""
    return d * (d if d <= 2 * COLUMNS else COLUMNS + 1)


def add(M: Tensor, g: Tensor, K: Tensor) -> None:
    """Add those of a batch: `g` (batch, tokens, d), and the `K` (batch, tokens, tokens) between."""
    flat, between = g.flatten(0, 1), (K @ g).flatten(0, 1)
    if M.shape[0] == M.shape[1]:
        M += flat.T @ between
        return
    M[:, :-1] += flat.T @ (between @ test_matrix(len(M), M.device))
    M[:, -1] += (flat * between).sum(0)


def trace(M: Tensor) -> Tensor:
    """In float64."""
    return (M[:, -1].double().sum() if _sketched(M) else M.double().trace()).clamp(min=0)


def form(M: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`X' M Y` (n, m) of X (d, n) and Y (d, m), in float64; of a sketch with all that it holds."""
    x, y = x.double(), y.double()
    if not _sketched(M):
        return x.T @ M.double() @ y
    U, values, rest = _low(M)
    return (U @ x).T @ (values[:, None] * (U @ y)) + x.T @ (rest[:, None] * y)


def sides(M: Tensor, directions: int) -> Sides:
    """The leading directions, and the diagonal of the rest."""
    if not _sketched(M):
        return Sides.of(M, directions)
    U, values, rest = (x.float() for x in _low(M))
    cut = (values[directions:, None] * U[directions:].square()).sum(0)
    return Sides(U[:directions].contiguous(), values[:directions].sqrt().diag()[None], (rest + cut)[None])


def rows(M: Tensor) -> Tensor:
    """Rows (n, d) of which M is the second moments; of a sketch, its low-rank part."""
    if _sketched(M):
        U, values, _ = _low(M)
    else:
        values, U = torch.linalg.eigh(M.double())
        values, U = values.clamp(min=0), U.T
    return values.sqrt()[:, None] * U


def _sketched(M: Tensor) -> bool:
    return M.shape[0] != M.shape[1]


def _low(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows U (COLUMNS, d), their values, the largest first, and what they leave of the diagonal (d); all
    in float64. Directions that are rounding have value 0."""
    Y, diagonal, test = M[:, :-1].double(), M[:, -1].double(), test_matrix(len(M), M.device).double()
    shift = EPSILON * Y.norm()
    if shift == 0:
        return test.T, torch.zeros_like(test[0]), diagonal.clamp(min=0)
    if not bool(M.isfinite().all()):
        raise PmLlmError("the Fisher is not finite: gradients of the task's rows overflowed. Use float32 or bfloat16.")
    while True:
        shifted = Y + shift * test
        inner = test.T @ shifted
        L, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if not failed or shift > Y.norm():
            break
        shift = 10 * shift  # sums in float32 were a little off
    E = torch.linalg.solve_triangular(L, shifted.T, upper=False)  # (COLUMNS, d): M ~ E' E
    values, V = torch.linalg.eigh(E @ E.T)
    U = (V.T @ E) / values.clamp(min=torch.finfo(torch.float64).tiny).sqrt()[:, None]
    values = (values - shift).clamp(min=0).flip(0)
    U = U.flip(0) * (values > 1e-10 * values[0])[:, None]
    return U, values, (diagonal - (values[:, None] * U.square()).sum(0)).clamp(min=0)


@lru_cache(maxsize=16)
def test_matrix(d: int, device: torch.device) -> Tensor:
    """The fixed matrix that moments of width d are multiplied by."""
    found = torch.randn(d, COLUMNS, generator=torch.Generator().manual_seed(d))
    basis: Tensor = torch.linalg.qr(found)[0]
    return basis.to(device)
