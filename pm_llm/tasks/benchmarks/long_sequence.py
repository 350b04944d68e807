"""The long sequence (orders 4-6) of 15 classification tasks: rows and prompts are those of `standard_cl.py`."""

from __future__ import annotations

from pm_llm.tasks.benchmarks import standard_cl
from pm_llm.tasks.benchmarks.standard_cl import load_task

TASKS = standard_cl.TASKS
ORDERS = {name: standard_cl.ORDERS[name] for name in ("order4", "order5", "order6")}

__all__ = ["ORDERS", "TASKS", "load_task"]
