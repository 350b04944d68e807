"""The derivative of the loss towards given adapters, at the weights that a model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.families.base import Family, family_of
from pm_llm.fisher.measure import Batch, quiet, tapped


def sum_slopes(
    model: Any, batches: Iterable[Batch], towards: Sequence[Mapping[str, LowRank]], family: Family | None = None
) -> Tensor:
    """`<grad L, Delta_i>` for each of `towards`, L the family's loss summed over examples; float64.

    From the inputs x and output gradients g of each module, as `sum g . (x A' B')`: no weight gets a gradient.
    """
    device, family = next(model.parameters()).device, family or family_of(model)
    moved = [{name: LowRank(x.B.to(device), x.A.to(device)) for name, x in one.items()} for one in towards]
    sums = torch.zeros(len(moved), dtype=torch.float64)

    def take(name: str, x: Tensor, g: Tensor) -> None:
        for i, one in enumerate(moved):
            sums[i] += (g.float() * (x.float() @ one[name].A.T @ one[name].B.T)).sum().double().cpu()

    with quiet(model):
        for batch in batches:
            with tapped(model, take):
                family.loss(model, batch).backward()
    return sums
