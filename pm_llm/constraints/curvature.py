"""Curvature: the past tasks' quadratic, which the merge minimises along one line, as a penalty while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import ANEW, Context
from pm_llm.constraints.weighted import Weighted
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Needs, Penalties
from pm_llm.system.options import option


@dataclass
class Curvature(Weighted):
    """Add `weight * (1/2 <S o Delta, Delta> + <S o M - m, Delta>)` to the loss of each optimizer step.

    It is P&M's own objective (arXiv 2505.22389) without its line search: what the merge would have to take back is not
    learnt, so the coefficient comes out near 1. S and m are those of the `optimal` merge, in its form of the Fisher
    and in its scale. The Fisher is of the loss summed over an example's answer, the Trainer's loss is a mean over
    tokens: with answers of n tokens a `weight` of 1/n puts both on one scale.

    In the space of factors the penalty is taken where the loss is, at the perturbed adapter.

    The preset `pm_curvature` differs from the paper's `pm` in three things. It does not perturb: it minimises the
    quadratic in every direction while it trains, in place of along one line afterwards. Its Fisher is
    Kronecker-factored, which sees which inputs tasks share; with a diagonal's sums the same penalty is clearly weaker.
    And it is on the measured scale: on the raw one a task that is learnt to the end, whose Fisher vanishes, weighs
    nothing, and the next one is not let in.

    Args:
        weight: Of the penalty, at least 0.

    Raises:
        PmLlmError: If the weight is negative, the merge keeps no quadratic, or the start leaves out what was learned.
    """

    weight: float = option(1.0, least=0)
    _penalties: Penalties | None = field(default=None, init=False, repr=False)
    from_zero = True
    anew, in_factors_too = ANEW, True
    needs = Needs(quadratic=True)

    def begin(self, context: Context) -> None:
        if context.merge is None or not context.merge.quadratic:
            raise PmLlmError("constrain curvature needs merge optimal, which keeps the past tasks' quadratics.")
        self._penalties = context.merge.penalties(context.running) if context.running else None

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        return self._penalties(live) if self._penalties is not None else []
