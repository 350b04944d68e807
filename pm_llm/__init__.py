"""Perturb-and-Merge for language models: continual LoRA fine-tuning that leaves one ordinary PEFT adapter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it; imported on first use, so that `import pm_llm` does not import torch
_PUBLIC = {
    "ContinualSFTTrainer": "pm_llm.training.trainers",
    "ContinualSeq2SeqTrainer": "pm_llm.training.trainers",
    "ContinualDPOTrainer": "pm_llm.training.trainers",
    "Merger": "pm_llm.merges.merger",
    "measure": "pm_llm.fisher.rows",
    "mean_loss": "pm_llm.fisher.rows",
    "Task": "pm_llm.tasks.base",
    "ContinualSequence": "pm_llm.sequence",
    "Method": "pm_llm.methods",
    "load_tasks": "pm_llm.tasks.loading",
    "Adapter": "pm_llm.adapters.adapter",
    "Perturb": "pm_llm.constraints.perturb",
    "RunConfig": "pm_llm.config",
    "PmLlmError": "pm_llm.errors",
}

if TYPE_CHECKING:
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.config import RunConfig
    from pm_llm.constraints.perturb import Perturb
    from pm_llm.errors import PmLlmError
    from pm_llm.fisher.rows import mean_loss, measure
    from pm_llm.merges.merger import Merger
    from pm_llm.methods import Method
    from pm_llm.sequence import ContinualSequence
    from pm_llm.tasks.base import Task
    from pm_llm.tasks.loading import load_tasks
    from pm_llm.training.trainers import ContinualDPOTrainer, ContinualSeq2SeqTrainer, ContinualSFTTrainer

__all__ = [
    "Adapter",
    "ContinualDPOTrainer",
    "ContinualSFTTrainer",
    "ContinualSeq2SeqTrainer",
    "ContinualSequence",
    "Merger",
    "Method",
    "Perturb",
    "PmLlmError",
    "RunConfig",
    "Task",
    "__version__",
    "load_tasks",
    "mean_loss",
    "measure",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'pm_llm' has no attribute {name!r}")
