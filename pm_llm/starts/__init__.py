"""Starts: how the next task's adapter begins. Each is one file."""

from __future__ import annotations

from peft import PeftModel

from pm_llm.adapters import Adapter
from pm_llm.config import LoraSection

RUNNING, TASK = "running", "task"  # the names of the two adapters in a live model


class Start:
    """Prepares the model for a task: exactly one trainable adapter, named `TASK`.

    `continues` says whether the trained adapter already holds the running one, or comes on top of it (then the running
    one is active too, frozen, under the name `RUNNING`).
    """

    continues = False

    def prepare(self, model: PeftModel, running: Adapter | None, lora: LoraSection, seq2seq: bool) -> PeftModel:
        """`model` (a base model before the first task) with its adapters in place, active and trainable."""
        raise NotImplementedError
