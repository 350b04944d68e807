"""The derivative of the loss towards given adapters, at the weights that a model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pm_llm.adapters.live import device_of, lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.families.base import Family, family_of
from pm_llm.fisher.measure import Batch, idle, quiet, tapped
from pm_llm.system.sharing_out import in_step


def sum_slopes(
    model: Any, batches: Iterable[Batch], towards: Sequence[Mapping[str, LowRank]], family: Family | None = None
) -> Tensor:
    """`<grad L, Delta_i>` for each of `towards`, L the family's loss summed over examples; float64.

    From the inputs x and output gradients g of each module, as `sum g . (x A' B')`: no weight gets a gradient.
    """
    family, layers = family or family_of(model), lora_layers(model)
    places = {name: device_of(layer) for name, layer in layers.items()}
    moved = [{name: x.to(places[name]) for name, x in one.items()} for one in towards]
    sums, found = torch.zeros(len(moved), dtype=torch.float64), []

    def take(name: str, x: Tensor, g: Tensor) -> None:
        x, g = x.float(), g.float()
        found.append(torch.stack([(g * (x @ one[name].A.T @ one[name].B.T)).sum() for one in moved]))

    with quiet(model), in_step(model, partial(idle, model)):
        for batch in batches:
            with tapped(model, take):
                family.loss(model, batch).backward()
            sums += torch.stack([x.to(found[0].device) for x in found]).cpu().double().sum(dim=0)
            found.clear()
    return sums
