"""Alone: a new adapter on the base model, without what was learned before. For the bounds `joint` and `per_task`."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.families.base import Family
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start, train_further


@dataclass
class Alone(Start):
    """Train `W0 + Delta` from `Delta = 0`."""

    begins = "base"
    stands_on = "base"

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        return train_further(model, None, lora, family)
