"""LoRI: A stays as it was drawn, and few entries of B are trained (arXiv 2504.07448)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.constraints.base import ANEW, Constraint, Context, Live, Step
from pm_llm.errors import PmLlmError
from pm_llm.system.options import option


@dataclass
class Lori(Constraint):
    """A is frozen. After `calibration` of the steps the largest entries of B, over all modules, are chosen; B begins
    again at 0 and only they are trained.

    The paper trains twice, for the mask and with it; here both are parts of one training of a task (a choice, for one
    budget). The optimizer's averages stay.

    Args:
        keep: Share of B's entries that are trained in the end (the paper: 0.1).
        calibration: Share of a task's steps for the choice, after which at least one is left; 0 with `keep` 1: B is
            trained whole throughout (LoRI-D).
    """

    keep: float = option(0.1, above=0, most=1)
    calibration: float = option(0.25, least=0, below=1)
    _masks: list[Tensor] = field(default_factory=list, init=False, repr=False)
    from_zero = True
    anew = ANEW
    fixes_a = True

    @property
    def by_itself(self) -> bool:
        return True

    def begin(self, context: Context) -> None:
        self._masks = []

    def before_update(self, step: Step, live: Live) -> None:
        if step.steps == 1 and self.keep < 1:
            raise PmLlmError("lori: a task of one step leaves none to train what it chose. Give it more, or keep 1.")
        for i, name in enumerate(live.layers):
            a, b = live.weights(name)
            a.grad = None  # optimizers pass over it
            if self._masks and b.grad is not None:
                b.grad *= self._masks[i].to(b.grad)

    def after_update(self, step: Step, live: Live) -> None:
        matrices = [live.weights(name)[1] for name in live.layers]
        if not self._masks and self.keep < 1 and step.step + 1 >= min(self.calibration * step.steps, step.steps - 1):
            sizes = torch.cat([b.data.abs().flatten() for b in matrices])
            least = sizes.topk(max(1, round(self.keep * sizes.numel()))).values[-1]
            self._masks = [(b.data.abs() >= least).float() for b in matrices]
            for b in matrices:
                b.data.zero_()
        self._masks = [mask.to(b) for b, mask in zip(matrices, self._masks, strict=False)]
        for b, mask in zip(matrices, self._masks, strict=False):
            b.data *= mask

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"masks": self._masks}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self._masks = state.get("masks", [])
