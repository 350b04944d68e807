"""Last: the adapter as it was last trained is trained further, whatever became of it in the merge."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.families.base import Family
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start, train_further


@dataclass
class Last(Start):
    """Train `W0 + theta` from `theta = theta*_{t-1}`: plain sequential training, with merging beside it."""

    begins = "last"
    stands_on = "base"
    keeps_coordinates = True

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        return train_further(model, last, lora, family)
