"""Adapters, folded one after another."""

from __future__ import annotations

import torch

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.merges.base import Trained
from tests.invariants.test_closed_form import random_adapter


def folded(rule: str, count: int, continues: bool, **options) -> tuple[list[Adapter], list[Adapter], list[float]]:
    """The adapters that came, the running one after each, and the coefficients."""
    merger, running, came, left, used = Merger(rule, **options), None, [], [], []
    for t in range(count):
        came.append(random_adapter(t))
        running = merger.fold(running, came[-1], trained=Trained("base" if continues else "running"))
        left.append(running)
        used.append(merger.report.coefficient)
    return came, left, used


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter.factors[name].dense()
