"""Continue: the running adapter itself is trained further."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel

from pm_llm.adapters import Adapter, lora_layers, remove, set_active
from pm_llm.config import LoraSection
from pm_llm.models import add_task_adapter
from pm_llm.starts import RUNNING, TASK, Start


@dataclass
class Continue(Start):
    """Train `W0 + theta` from `theta = M_{t-1}`; rank and scaling stay as they are.

    The scaling matters: with Adam a step moves W by `scaling` times the learning rate, and the running adapter comes
    with its scaling folded in. Without unfolding it, every task but the first would train at another rate.
    """

    continues = True

    def prepare(self, model: PeftModel, running: Adapter | None, lora: LoraSection, seq2seq: bool) -> PeftModel:
        model = add_task_adapter(model, lora, seq2seq, TASK)
        if running is not None:
            scaling = {name: layer.scaling[TASK] for name, layer in lora_layers(model).items()}
            running.attach(model, TASK, lora.lora_dropout, scaling)
            remove(model, RUNNING)
        set_active(model, [TASK], trainable=TASK)
        return model
