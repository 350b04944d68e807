"""EWC: a quadratic penalty on leaving what mattered to past tasks (arXiv 1612.00796; online: arXiv 1805.06370)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Context
from pm_llm.constraints.weighted import Weighted
from pm_llm.fisher.base import Needs, Penalty, Room
from pm_llm.fisher.of_factors import Factors, FactorsPast
from pm_llm.system.options import option


@dataclass
class Ewc(Weighted):
    """Add `weight / 2 * sum_i (theta - theta*_i)' F_i (theta - theta*_i)`, with theta = (s B, A).

    A sum of quadratics is one quadratic, so S = sum F_i and m = sum F_i o theta*_i are all that is kept, whatever the
    number of tasks. F_i is the diagonal empirical Fisher of the factors (:mod:`pm_llm.fisher`), of the loss summed
    over an answer, while the Trainer's loss is a mean over tokens.

    Args:
        weight: The paper's lambda.
        online: Keep one Fisher, `F = gamma F + F_t`, around the last theta only.
        gamma: How much of the old Fisher stays, with `online`.

    Raises:
        PmLlmError: If a number is out of range.
    """

    weight: float = option(1.0, least=0)
    online: bool = False
    gamma: float = option(1.0, least=0, most=1)
    past: dict[str, FactorsPast] = field(default_factory=dict, init=False, repr=False)
    _penalties: dict[str, Penalty] = field(default_factory=dict, init=False, repr=False)
    needs = Needs(fisher="factors")
    stores = "a Fisher and a sum of the adapter's shape"
    in_coordinates = True

    def begin(self, context: Context) -> None:
        self._penalties = {name: past.penalty(context.running[name]) for name, past in self.past.items()}

    def terms(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        return [of(live[name]) for name, of in self._penalties.items()]

    def remember(self, context: Context) -> None:
        assert context.fisher is not None
        for name, theta in context.new.items():
            fisher, past = context.fisher.modules[name], self.past.get(name)
            if self.online and past is not None:
                fisher = Factors(self.gamma * past.S.B + fisher.B, self.gamma * past.S.A + fisher.A)
            self.past[name] = FactorsPast.plus(None if self.online else past, fisher, theta, Room())

    def memory(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": x for name, past in self.past.items() for key, x in past.tensors().items()}

    def remembers(self, n: int, m: int, r: int) -> int:
        return 2 * (n + m) * r

    def load_memory(self, memory: dict[str, Tensor]) -> None:
        names = {key.rpartition(".")[0] for key in memory}
        self.past = {n: FactorsPast(**{key: memory[f"{n}.{key}"] for key in FactorsPast.names}) for n in names}
