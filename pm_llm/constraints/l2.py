"""L2: a penalty on leaving where the task began; EWC with a Fisher of ones (as compared with in arXiv 1612.00796)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pm_llm.constraints import Constraint, Context
from pm_llm.errors import check_number
from pm_llm.lowrank import LowRank


@dataclass
class L2(Constraint):
    """Add `weight / 2 * ||theta - theta_{t-1}||^2`, theta = (s B, A) of an adapter that continues; not in task 1.

    Args:
        weight: The penalty's weight, at least 0.
    """

    weight: float = 0.1
    _before: Mapping[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    in_coordinates = True

    def __post_init__(self) -> None:
        check_number("l2: weight", self.weight, 0)

    def prepare(self, context: Context) -> None:
        device = None if context.live is None else context.live.device()
        self._before = {name: LowRank(x.B.to(device), x.A.to(device)) for name, x in context.running.items()}

    def penalty(self, live: Mapping[str, LowRank]) -> Tensor | None:
        if not self._before or self.weight == 0:
            return None
        parts = []
        for name, x in live.items():
            before = self._before[name]
            for now, then in ((x.B, before.B), (x.A, before.A)):
                parts.append((now - then).square().sum())
        return self.weight / 2 * sum(parts[1:], start=parts[0])
