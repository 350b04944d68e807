"""L2: a penalty on leaving the adapter merged before; EWC with a Fisher of ones (compared to in arXiv 1612.00796)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Context
from pm_llm.constraints.weighted import Weighted
from pm_llm.system.options import option


@dataclass
class L2(Weighted):
    """Add `weight / 2 * ||theta - theta_{t-1}||^2`, theta = (s B, A) of an adapter that continues; not in task 1.

    Args:
        weight: The penalty's weight, at least 0.
    """

    weight: float = option(0.1, least=0)
    _before: Mapping[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    in_coordinates = True

    def begin(self, context: Context) -> None:
        device = None if context.live is None else context.live.device()
        self._before = {name: x.to(device) for name, x in context.running.items()}

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        return [
            (now - then).square().sum() / 2
            for name, before in self._before.items()
            for now, then in ((live[name].B, before.B), (live[name].A, before.A))
        ]
