"""OPCM: task vectors are projected off what is merged already, and all is brought to one norm (arXiv 2501.09522)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.base import Coefficients, Fold, Merge
from pm_llm.system.options import option


@dataclass
class Opcm(Merge):
    """With `U S V' = svd(M_{t-1})` and `k = min{k: sum_{i<=k} s_i >= threshold * sum s}`:

        M_t = (lambda_{t-1} M_{t-1} + P(theta*_t)) / lambda_t

    P keeps the directions `u_i v_j'` with i, j > k and i != j; lambda_t is such that the norm of M_t is the mean norm
    of the task vectors so far, which are relative to the base (`start: last` trains on from the last task). Uncertain:
    whether norms are of each matrix (taken here) or of the whole model. Beyond the rank of M the singular vectors are
    arbitrary, so i = j is left out within its rank only.

    Args:
        threshold: Share of the singular values' sum that is kept clear.
        variant: `paper`, or `reference` (the authors' code): k is one less, and only the block i, j <= k and the
            diagonal are left out.
    """

    threshold: float = option(0.5, above=0, most=1)
    variant: str = option("paper", choices=("paper", "reference"))
    norms: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # mean over the task vectors
    scales: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # lambda
    needs_history, dense = True, True
    stores = "two norms a module"

    def coefficients(self, fold: Fold) -> Coefficients:
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        vector = fold.theta(name)
        norm = sqrt(lowrank.inner(vector, vector))
        if not fold.running:
            self.norms[name], self.scales[name] = norm, 1.0
            return vector
        before = fold.running[name]
        total = lowrank.add(before.scale(self.scales[name]), project(before, vector, self.threshold, self.variant))
        self.norms[name] += (norm - self.norms[name]) / fold.task
        size = sqrt(max(0.0, lowrank.inner(total, total)))
        if not size > 0:  # no task has moved this module: attention to one token has no gradient
            return total
        self.scales[name] = size / self.norms[name]
        return total.scale(1 / self.scales[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": torch.tensor(value, dtype=torch.float64)
            for kind, values in (("norm", self.norms), ("scale", self.scales))
            for name, value in values.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.norms = {key.removesuffix(".norm"): float(x) for key, x in state.items() if key.endswith(".norm")}
        self.scales = {key.removesuffix(".scale"): float(x) for key, x in state.items() if key.endswith(".scale")}


def project(before: LowRank, x: LowRank, threshold: float, variant: str) -> LowRank:
    """P(x) above, for the singular vectors of `before`; in low-rank factors."""
    q_b, r_b = torch.linalg.qr(before.B.double())
    q_a, r_a = torch.linalg.qr(before.A.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    rank = int((s > 1e-7 * s[0]).sum())  # float32 factors know no more
    U, V, s = (q_b @ u)[:, :rank], (q_a @ vh.T)[:, :rank], s[:rank]
    k = int((s.cumsum(0) < threshold * s.sum()).sum()) + 1
    k = min(k, rank) if variant == "paper" else k - 1
    b, a = x.B.double(), x.A.double()
    diagonal = ((U.T @ b) * (a @ V).T).sum(1)[k:]  # u_i' x v_i
    if variant == "paper":
        parts = [LowRank(b - U[:, :k] @ (U[:, :k].T @ b), a - (a @ V[:, :k]) @ V[:, :k].T)]
    else:
        parts = [LowRank(b, a), LowRank(-U[:, :k] @ (U[:, :k].T @ b), (a @ V[:, :k]) @ V[:, :k].T)]
    parts.append(LowRank(-U[:, k:] * diagonal, V[:, k:].T.contiguous()))
    found = lowrank.add(*parts)
    return LowRank(found.B.to(x.B.dtype), found.A.to(x.A.dtype))
