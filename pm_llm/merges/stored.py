"""What rules share that merge all task vectors anew after each task, and so must keep them all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank, from_dense
from pm_llm.merges.base import Coefficients, Fold, Merge


@dataclass
class Stored(Merge):
    """`M_t = combine(Delta_1, ..., Delta_t)`, entry by entry on the dense matrices of one module at a time.

    What is kept grows by one adapter a task. The result is of full rank: `max_rank` cuts it, and the error is told.
    """

    vectors: list[dict[str, LowRank]] = field(default_factory=list, init=False, repr=False)
    needs_history = True
    old_adapters = True
    dense = True
    stores = "every task's adapter"

    def combine(self, name: str, vectors: list[Tensor]) -> Tensor:
        """The merged (d_out, d_in) matrix of a module."""
        raise NotImplementedError

    def coefficients(self, fold: Fold) -> Coefficients:
        self.vectors.append({name: fold.vector(name) for name in fold.new})
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return from_dense(self.combine(name, [vectors[name].dense() for vectors in self.vectors]))

    def remembers(self, n: int, m: int, r: int, tasks: int, whole: int, form: str | None) -> int:
        return tasks * (n + m) * r

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{t}.{side}.{name}": getattr(x, side).contiguous()
            for t, vectors in enumerate(self.vectors)
            for name, x in vectors.items()
            for side in ("B", "A")
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        found: dict[int, Any] = defaultdict(lambda: defaultdict(dict))
        for key, tensor in state.items():
            t, side, name = key.split(".", 2)
            found[int(t)][name][side] = tensor
        self.vectors = [{name: LowRank(**pair) for name, pair in found[t].items()} for t in sorted(found)]
