"""Align: entries that turn against what past tasks rely on are set back (PAM, arXiv 2506.03189)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Constraint, Context, Live, Step
from pm_llm.system.options import option


@dataclass
class Align(Constraint):
    """Every `every` steps, entries of A and B whose sign differs from an important entry of the running adapter's.

    Important are the largest by magnitude, the share `share` of each matrix. Such entries take the value `reset`. How
    often, and which value, the paper leaves open (choices). The optimizer's averages stay.

    Args:
        every: Optimizer steps between two looks, at least 1.
        share: Of a matrix's entries that count as important, from 0 (none) to 1.
        reset: `running`: the running adapter's value, where `start: continue` begins; `zero`.
    """

    every: int = option(10, least=1)
    share: float = option(0.5, least=0, most=1)
    reset: str = option("running", choices=("running", "zero"))
    _running: Mapping[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    in_coordinates = True

    def begin(self, context: Context) -> None:
        self._running = dict(context.running)

    def after_update(self, step: Step, live: Live) -> None:
        if not self._running or (step.step + 1) % self.every:
            return
        for name, running in self._running.items():
            a, b = live.weights(name)
            for p, value in ((a, running.A), (b, running.B / live.scaling(name))):
                value = value.to(p)
                against = important(value, self.share) & (p.data.sign() * value.sign() < 0)
                p.data = torch.where(against, value if self.reset == "running" else torch.zeros_like(value), p.data)


def important(x: Tensor, share: float) -> Tensor:
    """Where the largest entries by magnitude are, `share` of them (rounded)."""
    count = round(share * x.numel())
    found = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    found[x.abs().flatten().topk(count).indices] = True
    return found.view(x.shape)
