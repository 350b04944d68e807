"""What a constraint is given."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pm_llm.adapters.live import lora_layers
from pm_llm.constraints.base import Context, Live
from tests.conftest import KINDS, batch_of, features, make_peft


def chosen_rows(family: str, task: str = "sentiment") -> tuple[SimpleNamespace, list[dict[str, torch.Tensor]]]:
    rows = [batch_of(family, [row]) for row in features(family, 4, task)]
    return SimpleNamespace(one_by_one=lambda _: iter(rows), family=KINDS[family]), rows


def context_for(family: str, task: int) -> tuple[Context, list[dict[str, torch.Tensor]]]:
    model = make_peft(family)
    chosen, rows = chosen_rows(family, ("sentiment", "question")[task - 1])
    return Context(task, live=Live(lora_layers(model), "default"), model=model, chosen=chosen), rows
