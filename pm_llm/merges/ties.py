"""TIES: trim each task vector, elect a sign for each entry, average those that agree (arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning
from torch import Tensor

from pm_llm.merges.stored import Stored
from pm_llm.system.options import option


@dataclass
class Ties(Stored):
    """On the task vectors, with PEFT's operations.

    Args:
        density: Share of each matrix's entries that is kept of a task vector, the largest (as in PEFT; the paper ranks
            the entries of all matrices together); 1: all.
        scale: Of the result (the paper's lambda).
        majority_sign_method: `total` (of the values, the paper) or `frequency` (of the signs).
    """

    density: float = option(0.2, above=0, most=1)
    scale: float = 1.0
    majority_sign_method: str = option("total", choices=("total", "frequency"))

    def combine(self, name: str, vectors: list[Tensor]) -> Tensor:
        kept = vectors if self.density == 1 else [magnitude_based_pruning(x, self.density) for x in vectors]
        stack = torch.stack(kept)
        signs = calculate_majority_sign_mask(stack, self.majority_sign_method)  # type: ignore[arg-type]
        return self.scale * disjoint_merge(stack, signs)
