"""Refresh: before each step, a small step the other way, which unlearns a little (arXiv 2403.13249)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pm_llm.constraints.base import Constraint, Live, Step
from pm_llm.system.options import option


@dataclass
class Refresh(Constraint):
    """`theta += rate * (1 + curvature F)^-1 g` on the batch, then the normal step from there.

    g is the gradient of the pass's loss on the scale of a step's (its mean, where all passes have as many answer
    tokens), F its square (uncertain in the paper: which Fisher). It doubles the cost of a step. With accumulation each
    pass is preceded by its own, so the run depends on how a batch is split.

    Args:
        rate: Size of the step the other way, at least 0.
        curvature: Weight of the Fisher in its preconditioner, at least 0.
    """

    rate: float = option(1e-5, least=0)
    curvature: float = option(1e-3, least=0)
    moves = True

    def before_pass(self, step: Step, live: Live, gradient: Callable[[], list[Tensor]]) -> None:
        for p, g in zip(live.parameters(), gradient(), strict=True):
            p.data += self.rate * g / (1 + self.curvature * g.square())
