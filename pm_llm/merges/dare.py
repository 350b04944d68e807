"""DARE: drop entries of each task vector at random, scale up what is left, add up (arXiv 2311.03099)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from pm_llm.merges.stored import Stored
from pm_llm.system.options import option


@dataclass
class Dare(Stored):
    """`M_t = scale * sum_i mask_i o Delta_i / density`, whose expectation is the sum of the task vectors.

    The mask of a task and module is a function of `seed`, so every fold, and every resumed run, draws the same.

    Args:
        density: Share of the entries that is kept; 1: all, which is task arithmetic.
        scale: Of the result.
        seed: Of the masks.
    """

    density: float = option(0.2, above=0, most=1)
    scale: float = 1.0
    seed: int = 0

    def combine(self, name: str, vectors: list[Tensor]) -> Tensor:
        total = torch.zeros_like(vectors[0])
        for task, x in enumerate(vectors, start=1):
            generator = torch.Generator().manual_seed(random.Random(f"dare {self.seed} {task} {name}").getrandbits(63))
            total += x * (torch.rand(x.shape, generator=generator) < self.density) / self.density
        return self.scale * total
