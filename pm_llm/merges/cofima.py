"""CoFiMA: the model before and the model after, averaged entry by entry with their Fishers (arXiv 2312.08977)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher, Needs
from pm_llm.fisher.of_factors import Factors
from pm_llm.merges.base import Coefficients, Fold, Merge, check_coordinates
from pm_llm.system.options import option


@dataclass
class Cofima(Merge):
    """`M_t = (w F_t o theta*_t + (1 - w) P o M_{t-1}) / (w F_t + (1 - w) P)`, entry by entry of A and of B.

    P is the Fisher of the task before (the paper), or the sum over all of them: with that and w = 1/2 each entry is
    at the minimum of all tasks' quadratics. Where neither Fisher says anything it is the plain mean, with weight w.
    For an adapter that continues: in the weights the result would be of full rank.

    Args:
        weight: w, of the new model, from 0 to 1.
        past: `last` (the paper), or `sum`.
    """

    weight: float = option(0.5, least=0, most=1)
    past: str = option("last", choices=("last", "sum"))
    fishers: dict[str, Factors] = field(default_factory=dict, init=False, repr=False)
    needs = Needs(fisher="factors")
    needs_history = True
    in_factors = True
    stores = "a Fisher of the adapter's shape"

    def remembers(self, n: int, m: int, r: int, tasks: int, whole: int, form: str | None) -> int:
        return (n + m) * r

    def coefficients(self, fold: Fold) -> Coefficients:
        check_coordinates("cofima", fold)
        return Coefficients.same(self.weight if fold.running else 1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        assert isinstance(fold.fisher, Fisher)
        own, new = fold.fisher.modules[name], fold.new[name]
        if not isinstance(own, Factors):
            raise PmLlmError(f"cofima: the Fisher of {name} is {type(own).__name__}; it must be of the factors.")
        before, past = fold.running.get(name), self.fishers.get(name)
        keep = own if past is None or self.past == "last" else Factors(past.B + own.B, past.A + own.A)
        self.fishers[name] = keep
        if before is None or past is None:
            return new
        return LowRank(
            self._mean(new.B, own.B, before.B, past.B),
            self._mean(new.A, own.A, before.A, past.A),
        )

    def _mean(self, new: Tensor, own: Tensor, before: Tensor, past: Tensor) -> Tensor:
        left, right = self.weight * own.double(), (1 - self.weight) * past.double()
        total = left + right
        share = torch.where(total > 0, left / total.clamp(min=1e-300), torch.full_like(total, self.weight))
        return (before + share * (new - before)).to(new.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{side}": getattr(f, side) for name, f in self.fishers.items() for side in ("B", "A")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        names = {key.rpartition(".")[0] for key in state}
        self.fishers = {name: Factors(state[f"{name}.B"], state[f"{name}.A"]) for name in names}
