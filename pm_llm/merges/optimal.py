"""Optimal: the coefficient in closed form (P&M, arXiv 2505.22389)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.fisher import scale_of, weighted_inner
from pm_llm.merges import Coefficients, Fold, Merge


@dataclass
class Optimal(Merge):
    """The alpha that minimises the past and present quadratics along the task vector:

        M_t     = M_{t-1} + alpha_t Delta_t
        alpha_t = argmin  sum_{i<=t} 1/2 (M_t - theta*_i)' F_i (M_t - theta*_i)
                = <m_t - S_t o M_{t-1}, Delta_t> / <S_t o Delta_t, Delta_t>
        S_t     = S_{t-1} + F_t,   m_t = m_{t-1} + F_t o theta*_t

    The two accumulators S and m replace all past Fishers and optima. `alpha_1 = 1`; equal Fishers give `1/t`.

    Args:
        granularity: `model` (one alpha) or `module` (one each; as exact, since a diagonal Fisher separates).
        clip: Clip alpha to [0, 1] (a choice; the raw value is always recorded).
        fisher_scale: `raw` (the paper), `trace` or `own`, see :func:`pm_llm.fisher.scale_of`.

    Raises:
        PmLlmError: On an option out of range, or a denominator that is zero or not finite, naming the module.
    """

    granularity: str = "model"
    clip: bool = True
    fisher_scale: str = "raw"
    S: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    m: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    needs_fisher = True
    needs_history = True

    def __post_init__(self) -> None:
        if self.granularity not in ("model", "module"):
            raise PmLlmError(f"optimal: granularity is {self.granularity!r}; it must be model or module.")
        if self.fisher_scale not in ("raw", "trace", "own"):
            raise PmLlmError(f"optimal: fisher_scale is {self.fisher_scale!r}; it must be raw, trace or own.")

    def coefficients(self, fold: Fold) -> Coefficients:
        assert fold.fisher is not None
        if set(fold.fisher) != set(fold.delta):
            raise PmLlmError("the Fisher and the adapter are of different modules. Compute it on the same model.")
        above, below, S, m = {}, {}, {}, {}
        size = scale_of(fold.fisher, self.fisher_scale, fold.delta)
        for name, raw_fisher in fold.fisher.items():
            delta, theta, fisher = fold.delta[name].dense(), fold.theta[name].dense(), raw_fisher / size
            S[name], m[name] = self.zeros(*fisher.shape).copy_(fisher), self.zeros(*fisher.shape).copy_(fisher * theta)
            if self.S:
                S[name] += self.S[name]
                m[name] += self.m[name]
            residual = m[name] - S[name] * fold.running[name].dense() if fold.running else m[name]
            above[name] = float((residual.double() * delta.double()).sum())
            below[name] = weighted_inner(S[name], delta, delta)
        if self.granularity == "model":
            value = _divide(sum(above.values()), sum(below.values()), "the model")
            raw = dict.fromkeys(above, value)
        else:
            raw = {name: _divide(above[name], below[name], f"module {name}") for name in above}
        self.S, self.m = S, m
        if not fold.running:
            return Coefficients.same(1.0, fold.delta)  # theta*_1 = Delta_1: numerator and denominator are one sum
        used = {name: min(1.0, max(0.0, value)) if self.clip else value for name, value in raw.items()}
        return Coefficients(used, raw)

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"S.{name}": x.contiguous() for name, x in self.S.items()},
            **{f"m.{name}": x.contiguous() for name, x in self.m.items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.S = {name[2:]: x.to(torch.float32) for name, x in state.items() if name.startswith("S.")}
        self.m = {name[2:]: x.to(torch.float32) for name, x in state.items() if name.startswith("m.")}


def _divide(above: float, below: float, where: str) -> float:
    if not isfinite(above) or not isfinite(below) or below <= 0:
        raise PmLlmError(
            f"the coefficient of {where} is {above} / {below}: the task vector is zero or not finite, or the Fisher "
            "does not see it. Did training move the adapter (learning rate, number of steps, all of its modules used)?"
        )
    return above / below
