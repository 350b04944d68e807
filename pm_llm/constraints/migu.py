"""MIGU: only the rows with the largest outputs are updated (magnitude-based gradient updating, arXiv 2406.17245)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pm_llm.constraints.base import Constraint, Context, Live, Step
from pm_llm.system.options import option


@dataclass
class Migu(Constraint):
    """From the second task on, an output row of A or B gets its gradient if `n = sum |output|` is large.

    n is summed over the tokens of all passes of the optimizer step, and all processes. Padding does not count (in the
    authors' code it does: the mask then depends on how a step is split). Rows at or above the quantile `threshold` of
    their matrix keep their gradient; that of the others becomes zero. What Adam still moves by its averages is left.

    Args:
        threshold: Quantile below which rows are not updated, from 0 (all are) to 1 (only the largest).
    """

    threshold: float = option(0.7, least=0, most=1)
    _task: int = field(default=1, init=False, repr=False)
    _sums: dict[nn.Module, Tensor] = field(default_factory=dict, init=False, repr=False)

    def begin(self, context: Context) -> None:
        self._task = context.task

    @contextmanager
    def around(self, step: Step, live: Live, batch: Mapping[str, Any]) -> Iterator[None]:
        if self._task == 1:
            yield
            return
        if step.micro_step == 0:
            self._sums.clear()

        def hook(mask: Tensor | None) -> Any:
            def take(module: nn.Module, _: Any, output: Tensor) -> None:
                sizes = output.detach().float().abs()
                found = (sizes if mask is None else sizes * mask[..., None]).flatten(0, -2).sum(0)
                self._sums[module] = self._sums[module] + found if module in self._sums else found

            return take

        with ExitStack() as stack:
            for name in live.layers:
                for module in live.sides(name):
                    stack.callback(module.register_forward_hook(hook(live.family.tokens(name, batch))).remove)
            yield

    def before_update(self, step: Step, live: Live) -> None:
        for module, sums in self._sums.items():
            sums = live.total(sums)
            kept = sums >= torch.quantile(sums, self.threshold)
            gradient: Any = module.weight.grad
            if gradient is not None:
                gradient *= kept[:, None].to(gradient)
