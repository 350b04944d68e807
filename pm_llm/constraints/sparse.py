"""Sparse: few entries of the update are not zero, so that tasks collide in few (N-LoRA, arXiv 2410.10179)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.weighted import Weighted
from pm_llm.system.options import option


@dataclass
class Sparse(Weighted):
    """Add `weight * ||Delta||_1`, the sum over all entries of all modules of |s B A|, from the first task on.

    The product is formed in each step, module by module, and kept for the backward pass: as much memory as the adapted
    weights themselves have.

    Args:
        weight: The paper's lambda, at least 0.
    """

    weight: float = option(1e-4, least=0)
    from_zero = True

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        return [x.dense().abs().sum() for x in live.values()]
