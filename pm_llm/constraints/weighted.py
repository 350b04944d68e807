"""What constraints share that add a weighted penalty to the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Constraint


class Weighted(Constraint):
    """A penalty `weight * sum terms`; none where there are no terms, or the weight is 0."""

    weight: float

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        """The terms (0-dim), from each module's live (s B, A)."""
        raise NotImplementedError

    def penalty(self, live: Mapping[str, LowRank]) -> Tensor | None:
        found = self.terms(live) if self.weight else []
        if not found:
            return None
        place = found[0].device  # modules may be on several
        return self.weight * torch.stack([x.to(place) for x in found]).sum()
