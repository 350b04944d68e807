"""Frank-Wolfe: in the stored adapters' convex hull, step by step towards what the loss asks for (arXiv 2503.12649)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Needs
from pm_llm.merges.base import Coefficients, Fold
from pm_llm.merges.stored import Stored
from pm_llm.system.options import option


@dataclass
class FrankWolfe(Stored):
    """`M = sum_i w_i theta*_i` with weights that sum to 1. From equal weights, for k = 0, 1, ...: the adapter whose
    inner product with the gradient at M is least, `i = argmin <grad L(M), theta*_i>`, gets `gamma = 1 / (k + t + 1)`
    more, and all weights are scaled by `1 - gamma`.

    L is the loss on the current task's rows, the only ones at hand; the paper has rows of all tasks, so what is
    current is favoured here. Its step is `2 / (k + 2)`, which forgets where it began; this one counts the equal
    weights as t steps (a choice).

    Args:
        steps: How many; each is a pass over the rows that a Fisher would be measured on.
    """

    steps: int = option(3, least=0)
    weights_of: list[float] = field(default_factory=list, init=False, repr=False)
    needs = Needs(probe=True)
    whole, dense = True, False

    def coefficients(self, fold: Fold) -> Coefficients:
        self.vectors.append({name: fold.theta(name) for name in fold.new})
        t = len(self.vectors)
        self.weights_of = [1.0 / t] * t
        for k in range(self.steps if fold.trained.probe is not None and t > 1 else 0):
            assert fold.trained.probe is not None
            slopes = fold.trained.probe.slopes({name: self._sum(name) for name in fold.new}, self.vectors)
            best, gamma = slopes.index(min(slopes)), 1 / (k + t + 1)
            self.weights_of = [(1 - gamma) * w + gamma * (i == best) for i, w in enumerate(self.weights_of)]
        return Coefficients.same(self.weights_of[-1], fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return self._sum(name)

    def remembers(self, n: int, m: int, r: int, tasks: int, whole: int, form: str | None) -> int:
        return tasks * (n + m) * whole

    def _sum(self, name: str) -> LowRank:
        return lowrank.add(*(v[name].scale(weight) for v, weight in zip(self.vectors, self.weights_of, strict=True)))
