"""Anchor: on the task's own rows the model goes on saying what it said before (LwF, arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pm_llm.constraints.base import Constraint, Live, Step
from pm_llm.system.options import option


@dataclass
class Anchor(Constraint):
    """Add to the loss of each answer token

        weight * T^2 * KL(p || q),   KL(p || q) = sum_v p_v log(p_v / q_v)

    with q the model's distribution over the vocabulary at temperature T and p that of the model before the task. That
    is the same network with the task adapter switched off: a forward pass without gradient, and nothing is kept. The
    factor T^2 keeps the gradient's size when T changes (arXiv 1503.02531).

    Args:
        weight: Of the term, at least 0.
        temperature: T, above 0.
    """

    weight: float = option(1.0, least=0)
    temperature: float = option(1.0, above=0)
    from_zero = True
    anew = "with the task adapter off the model must be what it was before the task"

    def loss(
        self, step: Step, live: Live, inputs: Mapping[str, Any], outputs: Tensor, reference: Callable[[], Tensor]
    ) -> Tensor | None:
        if not self.weight:
            return None
        p, q = ((x.float() / self.temperature).log_softmax(-1) for x in (reference(), outputs))
        return self.weight * self.temperature**2 * (p.exp() * (p - q)).sum(-1)
