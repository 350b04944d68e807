"""Perturb: scale the task adapter by 1 + eps, 1 or 1 - eps at random in each step (P&M, arXiv 2505.22389)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pm_llm.constraints.base import Constraint, Context, Step
from pm_llm.system.options import option


@dataclass
class Perturb(Constraint):
    """Train on `W0 + M + (1 + s eps) Delta`, with s drawn from {-1, 0, +1} with probabilities (p, 1 - 2p, p).

    In expectation over s the loss is `(1 - 2p) L0 + p (L+ + L-) = L0 + p eps^2 Delta' H Delta + O(eps^4)`: a penalty
    on the curvature H along the task vector Delta, with weight `lambda = p eps^2`, for no extra forward pass. The
    gradient through the factor (1 + s eps) is kept (a choice; the paper does not say).

    The sign is a pure function of (seed, step, micro-step, rank): a resumed run draws the same. By default one sign
    serves the whole optimizer step on every process, so a run does not depend on how its batch is split. With
    `per_micro_step` or `per_rank` the signs differ and are stratified (systematic sampling: one uniform number per
    step, shifted evenly), which balances the three values within the step.

    Free by-product: running means of the loss under each sign estimate `Delta' H Delta` as
    `(L+ + L- - 2 L0) / eps^2`. Means are exponential with horizon `1 / (1 - decay)` passes (a choice: the loss falls
    while training, an even mean would mix old with new). Noisy early on; logged as `curvature` once all three signs
    have been seen.

    Args:
        epsilon: Size of the perturbation, 0 <= epsilon <= 1 (0: none; with `cover` only that matters).
        probability: p above, 0 <= p <= 0.5.
        per_micro_step: Draw a sign for every accumulated forward pass.
        per_rank: Draw a sign for every data-parallel process.
        decay: Of the running means of the loss, 0 <= decay < 1.
        space: `weights` (the paper): Delta is the update B A. `factors`, for an adapter that continues: Delta is the
            way theta = (A, B) has gone since the task began, `theta + s eps (theta - theta_hat)`.
        scales: `symmetric` (the paper), or `cover`: 1, and with probability 2p the coefficient to be expected, 1/t
            in task t (what equal Fishers give), which 1 - eps may be far above. Then no curvature
            is logged.

    Raises:
        PmLlmError: If an argument is out of range.
    """

    epsilon: float = option(0.5, least=0, most=1)
    probability: float = option(1 / 3, least=0, most=0.5)
    per_micro_step: bool = False
    per_rank: bool = False
    decay: float = option(0.98, least=0, below=1)
    space: str = option("weights", choices=("weights", "factors"))
    scales: str = option("symmetric", choices=("symmetric", "cover"))
    anew = "one adapter holds all, so it would perturb the past tasks too"
    in_factors_too = True
    _expected: float = field(default=1.0, init=False, repr=False)
    _sums: dict[int, list[Tensor]] = field(  # sign -> [decayed sum of losses, decayed count]
        default_factory=lambda: {s: [torch.zeros(()), torch.zeros(())] for s in (-1, 0, 1)}, init=False, repr=False
    )
    from_zero = True

    @property
    def by_itself(self) -> bool:
        return self.scales != "cover"

    def begin(self, context: Context) -> None:
        self._expected = 1.0 / context.task

    def sign(self, step: Step) -> int:
        """-1, 0 or +1 for this pass."""
        parts = (step.micro_steps if self.per_micro_step else 1) * (step.world_size if self.per_rank else 1)
        rng = random.Random(f"perturb {step.seed} {step.step}")
        u = rng.random()
        if parts > 1:
            micro, rank = (step.micro_step if self.per_micro_step else 0), (step.rank if self.per_rank else 0)
            place = micro * (step.world_size if self.per_rank else 1) + rank
            u = (u + rng.sample(range(parts), parts)[place % parts] / parts) % 1.0
        return -1 if u < self.probability else 1 if u < 2 * self.probability else 0

    def scale(self, step: Step) -> float:
        sign = self.sign(step)
        if self.scales == "cover":
            return 1.0 if sign == 0 or self.epsilon == 0 else self._expected
        return 1.0 + sign * self.epsilon

    def observe(self, step: Step, loss: Tensor) -> None:
        sums = self._sums[self.sign(step)]
        sums[0] = self.decay * sums[0] + (1 - self.decay) * loss
        sums[1] = self.decay * sums[1] + (1 - self.decay)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {f"perturb{s:+d}": sums for s, sums in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self._sums = {s: state[f"perturb{s:+d}"] for s in self._sums}

    def logs(self, state: dict[str, list[float]]) -> dict[str, float]:
        sums = [state[f"perturb{s:+d}"] for s in (-1, 0, 1)]
        if self.epsilon == 0 or self.scales == "cover" or any(weight == 0 for _, weight in sums):
            return {}
        minus, zero, plus = (total / weight for total, weight in sums)
        return {"curvature": (plus + minus - 2 * zero) / self.epsilon**2}
