"""Null space: A is fixed where the task's inputs are and past tasks' were not (InfLoRA, arXiv 2404.00228)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.adapters.adapter import check_rank
from pm_llm.algebra.bases import extended_by_moments, leading, without
from pm_llm.constraints.base import Context, Live, Step
from pm_llm.constraints.spans import Spans
from pm_llm.fisher.inputs import second_moments
from pm_llm.system.options import option

ROUNDING = 1e-6  # of the inputs' squared norm: second moments in float32 hold no less


@dataclass
class NullSpace(Spans):
    """A is set to the leading principal directions of the task's inputs, less the span of past tasks' inputs; only B
    is trained. So `B A x = 0` for every x in that span, which is kept as an orthonormal basis for each module.

    Inputs are those of each adapted module on the rows that a Fisher would be measured on, by their second moments
    (:mod:`pm_llm.fisher.inputs` says what these cost); each, (d_in, d_in), is decomposed before and after a task. The
    authors keep a second basis once the span is large (DualGPM); here it stops growing at `most` instead (a choice).

    Args:
        share: Of the inputs' squared norm that the basis is to hold after a task.
        most: Of the input space's dimensions that the basis may fill; the rest is what new tasks can still use.
    """

    share: float = option(0.95, least=0, most=1)
    most: float = option(0.8, least=0, most=1)
    bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    stores = "a basis of past inputs a module"
    called = "null_space"
    fixes_a = True

    def begin(self, context: Context) -> None:
        assert context.live is not None
        assert context.chosen is not None
        check_rank(context.live.layers, context.live.adapter, f"{self.called}: a basis")
        for name, moments in second_moments(context.model, context.live.layers, context.chosen).items():
            a, _ = context.live.weights(name)
            basis = self.bases.get(name)
            energies, directions = leading(moments, basis)
            # a direction that no input has is left out: Adam would make steps of its rounding
            seen = energies[: len(a), None] > ROUNDING * moments.double().trace()
            with torch.no_grad():
                a.copy_((without(directions[: len(a)], basis) * seen).to(a))

    def before_update(self, step: Step, live: Live) -> None:
        for name in live.layers:
            live.weights(name)[0].grad = None  # optimizers pass over it

    def remember(self, context: Context) -> None:
        assert context.live is not None
        assert context.chosen is not None
        for name, moments in second_moments(context.model, context.live.layers, context.chosen).items():
            most = int(self.most * moments.shape[1])
            self.bases[name] = extended_by_moments(self.bases.get(name), moments, self.share, most)
