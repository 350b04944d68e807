"""Anchor: on the task's own rows the model goes on saying what it said before (LwF, arXiv 1606.09282).

The same file weights the answers' tokens, by what the model thinks of them itself: the two go together (ASFT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pm_llm.constraints.base import Constraint, Live, Step
from pm_llm.system.options import option

TOP = 20  # probabilities of which EAFT takes the entropy, which is at most ln 20, about 3


@dataclass
class Anchor(Constraint):
    """Add to the loss of each answer token

        weight * T^2 * KL(p || q),   KL(p || q) = sum_v p_v log(p_v / q_v)

    with q the model's distribution over the vocabulary at temperature T and p that of the model before the task. That
    is the same network with the task adapter switched off: a forward pass without gradient, and nothing is kept. The
    factor T^2 keeps the gradient's size when T changes (arXiv 1503.02531). With `to: base`, p is of the base model:
    the network with all adapters off.

    With `reweight`, the loss of an answer token y itself counts w times, w without gradient: `dft` q_y, so that what
    the model finds unlikely pulls less (DFT, arXiv 2508.05629; with the KL it is ASFT, arXiv 2509.23753); `eaft`
    H / 3, with H the entropy of the model's 20 likeliest tokens, in nats, renormalised, so that what it is sure of,
    and is to unlearn, pulls less (EAFT, arXiv 2601.02151, whose formula is taken from public implementations).

    Args:
        weight: Of the KL, at least 0.
        temperature: T, above 0.
        to: `before` (the model before the task) or `base`.
        reweight: `none`, `dft` or `eaft`.
    """

    weight: float = option(1.0, least=0)
    temperature: float = option(1.0, above=0)
    to: str = option("before", choices=("before", "base"))
    reweight: str = option("none", choices=("none", "dft", "eaft"))
    from_zero = True

    @property
    def anew(self) -> str:  # type: ignore[override]
        """Where the adapter continues, the model before the task is gone; the base is not."""
        return "" if self.to == "base" else "with the task adapter off the model must be what it was before the task"

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether the base weights must be what they are."""
        return self.to == "base"

    def loss(
        self, step: Step, live: Live, inputs: Mapping[str, Any], outputs: Tensor, reference: Callable[[str], Tensor]
    ) -> Tensor | None:
        found = []
        if self.weight:
            p, q = ((x.float() / self.temperature).log_softmax(-1) for x in (reference(self.to), outputs))
            found.append(self.weight * self.temperature**2 * (p.exp() * (p - q)).sum(-1))
        if self.reweight != "none":
            labels = live.family.labels(dict(inputs))
            q = outputs.float().log_softmax(-1)
            said = q.gather(-1, labels[labels != -100][:, None]).squeeze(-1)
            found.append((1 - self._weights(q, said)) * said)  # the loss itself is -said
        return sum(found[1:], start=found[0]) if found else None

    def _weights(self, q: Tensor, said: Tensor) -> Tensor:
        """w of each token, from log-probabilities (tokens, vocabulary) and those of the answer (tokens,)."""
        if self.reweight == "dft":
            return said.detach().exp()
        top = q.detach().topk(min(TOP, q.shape[-1]), dim=-1).values.log_softmax(-1)
        return -(top.exp() * top).sum(-1) / 3
