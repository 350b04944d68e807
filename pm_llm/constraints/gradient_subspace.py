"""Gradient subspace: A stays orthogonal to the directions that past tasks were learned in (CoSO, arXiv 2505.11816)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.algebra.bases import Sketch, extended, without
from pm_llm.constraints.base import Context, Live, Step
from pm_llm.constraints.spans import Spans
from pm_llm.fisher import moments
from pm_llm.system.options import option


@dataclass
class GradientSubspace(Spans):
    """Before training and after each optimizer step A is projected off the past tasks' span, so that `B A v = 0` for v
    in it.

    In the manner of CoSO: the rows of the gradients of A, which lie in the row space of the weights' gradient, go into
    a Frequent Directions sketch while a task is trained; its leading directions then join the span. CoSO itself trains
    the weights in a sequence of subspaces, where here the adapter's rank is the subspace.

    Args:
        share: Of the sketch's squared norm that the span is to hold after a task.
        size: Rows of the sketch (it holds up to twice as many).
        most: Of the input space's dimensions that the span may fill.
    """

    share: float = option(0.95, least=0, most=1)
    size: int = option(16, least=1)
    most: float = option(0.8, least=0, most=1)
    bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sketches: dict[str, Sketch] = field(default_factory=dict, init=False, repr=False)
    stores = "a basis of past gradients a module"
    called = "gradient_subspace"
    moves = True
    inherits = "kronecker"

    def begin(self, context: Context) -> None:
        assert context.live is not None
        self.bases = {name: basis.to(context.live.device()) for name, basis in self.bases.items()}
        self._sketches = {name: Sketch(self.size) for name in context.live.layers}
        self._project(context.live)

    def before_update(self, step: Step, live: Live) -> None:
        for name, sketch in self._sketches.items():
            gradient = live.weights(name)[0].grad
            if gradient is not None:
                rows = gradient.detach().float()
                sketch.add(torch.where(rows.isfinite().all(), rows, 0.0))  # a diverged loss is told elsewhere

    def after_update(self, step: Step, live: Live) -> None:
        self._project(live)

    def _project(self, live: Live) -> None:
        for name, basis in self.bases.items():
            a, _ = live.weights(name)
            a.data = without(a.data, basis)

    def remember(self, context: Context) -> None:
        for name, sketch in self._sketches.items():
            rows = None if sketch.rows is None else sketch.rows.cpu()
            if rows is not None and bool(rows.any()):
                past = self.bases.get(name)
                past = None if past is None else past.cpu()
                self.bases[name] = extended(past, rows, self.share, int(self.most * rows.shape[1]))

    def inherit(self, context: Context) -> None:
        """What was learned elsewhere left no sketch: `C = sum G' G` of the weights' gradients, the Kronecker Fisher's
        side of the inputs, has the directions that a sketch of them would hold."""
        assert context.fisher is not None
        for name, one in context.fisher.modules.items():
            most = int(self.most * len(one.C))
            self.bases[name] = extended(self.bases.get(name), moments.rows(one.C), self.share, most)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {f"sketch.{name}": [s.rows] for name, s in self._sketches.items() if s.rows is not None}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for key, (rows,) in state.items():
            self._sketches[key.removeprefix("sketch.")] = Sketch(self.size, rows)
