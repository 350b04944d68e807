"""Second moments of what the adapted modules are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pm_llm.system.processes import total
from pm_llm.system.sharing_out import in_step

if TYPE_CHECKING:
    from pm_llm.fisher.rows import ChosenRows


def second_moments(model: Any, layers: Mapping[str, Any], chosen: ChosenRows) -> dict[str, Tensor]:
    """For each module `sum x x'` (d_in, d_in) over all positions of the chosen rows of all processes, on CPU.

    In float32, one matrix a module, all at once: `4 d_in^2` bytes each, 4 GB for the 64 query and value projections of
    a 7B model.
    """
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    with _taking(layers, sums):
        pass_rows(model, chosen)
    return {name: total(moments).cpu() for name, moments in sums.items()}


def pass_rows(model: Any, chosen: ChosenRows) -> None:
    """The chosen rows through their loss, for hooks to look at: one by one without padding, so that every position
    counts (but for the shorter answer of a pair), in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), in_step(model):
            for row in chosen.one_by_one(model):
                chosen.family.loss(model, row)
    finally:
        model.train(was_training)


@contextmanager
def _taking(layers: Mapping[str, Any], sums: dict[str, Tensor]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            sums[name] = sums[name].to(x.device) + x.T @ x

        return take

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield
