"""Fresh: a new adapter (B = 0) on top of the frozen running one."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import RUNNING, TASK, set_active
from pm_llm.families.base import Family
from pm_llm.families.models import add_task_adapter
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start


@dataclass
class Fresh(Start):
    """Train `W0 + M_{t-1} + Delta` from `Delta = 0`."""

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        model = add_task_adapter(model, lora, family, TASK)
        if running is None:
            set_active(model, [TASK], trainable=TASK)
        else:
            running.attach(model, RUNNING)
            set_active(model, [RUNNING, TASK], trainable=TASK)
        return model
