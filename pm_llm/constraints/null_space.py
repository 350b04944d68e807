"""Null space: A is fixed where the task's inputs are and past tasks' were not (InfLoRA, arXiv 2404.00228)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pm_llm.constraints import Constraint, Context, Live, Step
from pm_llm.errors import check_number
from pm_llm.merges import Merge
from pm_llm.starts import Start, check_fresh
from pm_llm.subspace import extended, without


@dataclass
class NullSpace(Constraint):
    """A is set to the leading principal directions of the task's inputs, less the span of past tasks' inputs; only B
    is trained. So `B A x = 0` for every x in that span, which is kept as an orthonormal basis for each module.

    Inputs are those of each adapted module on the rows that a Fisher would be measured on, by their (d_in x d_in)
    second moments: one matrix of that size a module while a task begins and ends. The authors keep a second basis once
    the span is large (DualGPM); here it stops growing at `most` instead (a choice).

    Args:
        share: Of the inputs' squared norm that the basis is to hold after a task.
        most: Of the input space's dimensions that the basis may fill; the rest is what new tasks can still use.
    """

    share: float = 0.95
    most: float = 0.8
    bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _fixed: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    stores = "a basis of past inputs a module"

    def __post_init__(self) -> None:
        check_number("null_space: share", self.share, 0, 1)
        check_number("null_space: most", self.most, 0, 1)

    def check(self, start: Start, merge: Merge) -> None:
        check_fresh("constrain null_space", start)

    def prepare(self, context: Context) -> None:
        assert context.live is not None
        self._fixed = {}
        for name, roots in second_moments(context).items():
            a, _ = context.live.weights(name)
            _, _, vh = torch.linalg.svd(without(roots, self.bases.get(name)), full_matrices=False)
            self._fixed[name] = vh[: len(a)].to(a)
            with torch.no_grad():
                a.copy_(self._fixed[name])

    def before_update(self, step: Step, live: Live) -> None:
        for name in live.layers:
            live.weights(name)[0].grad = None

    def after_update(self, step: Step, live: Live) -> None:
        for name, fixed in self._fixed.items():
            live.weights(name)[0].data = fixed.clone()

    def remember(self, context: Context) -> None:
        for name, roots in second_moments(context).items():
            self.bases[name] = extended(self.bases.get(name), roots, self.share, int(self.most * roots.shape[1]))

    def memory(self) -> dict[str, Tensor]:
        return dict(self.bases)

    def load_memory(self, memory: dict[str, Tensor]) -> None:
        self.bases = dict(memory)


def second_moments(context: Context) -> dict[str, Tensor]:
    """For each module a matrix (d_in, d_in) whose rows have the second moments of its inputs, over all processes."""
    assert context.live is not None
    assert context.chosen is not None
    sums = {n: torch.zeros(x.in_features, x.in_features) for n, x in context.live.layers.items()}
    model, was_training = context.model, context.model.training
    model.eval()
    with torch.no_grad(), _taking(context.live, sums):
        for row in context.chosen.one_by_one(model):  # without padding, so that every position counts
            model(**row)
    model.train(was_training)
    found = {}
    for name, moments in sums.items():
        values, vectors = torch.linalg.eigh(context.live.total(moments).double().cpu())
        found[name] = (values.clamp(min=0).sqrt()[:, None] * vectors.T).flip(0)
    return found


@contextmanager
def _taking(live: Live, sums: dict[str, Tensor]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            sums[name] = sums[name].to(x.device) + x.T @ x

        return take

    with ExitStack() as stack:
        for name, layer in live.layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield
