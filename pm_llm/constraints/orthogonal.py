"""Orthogonal: the rows of the new A are kept orthogonal to those of past tasks (O-LoRA, arXiv 2310.14152)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import ANEW, Context
from pm_llm.constraints.weighted import Weighted
from pm_llm.system.options import option


@dataclass
class Orthogonal(Weighted):
    """Add `weight * sum |A_past A'|`, A_past the stacked A of all tasks so far.

    They are the rows of the running adapter's A. With `merge: sum` these are the past tasks' own until `max_rank` cuts
    it; from then on they are the directions that truncation kept, weighted by their size.

    Args:
        weight: The paper's lambda_1, at least 0.
    """

    weight: float = option(0.5, least=0)
    _past: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    from_zero = True
    anew = ANEW

    def begin(self, context: Context) -> None:
        self._past = {name: x.A for name, x in context.running.items()}

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        self._past = {name: past.to(live[name].A.device) for name, past in self._past.items()}
        return [(past @ live[name].A.T).abs().sum() for name, past in self._past.items()]
