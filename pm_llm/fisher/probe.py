"""The loss on the current task's rows at any adapter, and its slopes: what a merge may ask while it decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import set_active
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.rows import ChosenRows

Factors = Mapping[str, LowRank]


class Probe:
    """Asks a live model; it is left with the last adapter that was asked about, alone.

    Args:
        model: A PeftModel.
        name: What the adapter is called in it.
        like: An adapter of the same modules.
        chosen: The rows.
    """

    def __init__(self, model: Any, name: str, like: Adapter, chosen: ChosenRows) -> None:
        self.model, self.name, self.like, self.chosen = model, name, like, chosen

    def loss(self, at: Factors) -> float:
        """The mean loss (nats an example) of the base model with the adapter `at`."""
        self._attach(at)
        return self.chosen.loss(self.model)

    def slopes(self, at: Factors, towards: Sequence[Factors]) -> list[float]:
        """The derivatives of that loss at `at` towards each of the others."""
        self._attach(at)
        return self.chosen.slopes(self.model, towards)

    def _attach(self, at: Factors) -> None:
        self.like.replace_factors(at).attach(self.model, self.name)
        set_active(self.model, [self.name], trainable=self.name)
