"""Continue: the running adapter itself is trained further."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.families.base import Family
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start, train_further


@dataclass
class Continue(Start):
    """Train `W0 + theta` from `theta = M_{t-1}`, at the running adapter's rank (merges of weights let it grow)."""

    stands_on = "base"
    keeps_coordinates = True

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        return train_further(model, running, lora, family)
