"""Two steps with an adapter that the forward pass does not reach, and a penalty that does; under a launcher."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Context, Live
from pm_llm.constraints.l2 import L2
from pm_llm.system.processes import process_state, shut_down
from tests.conftest import make_model
from tests.helpers.step_script import make_trainer

if __name__ == "__main__":
    process_state()
    base = make_model("llama")
    base.model.spare = nn.Linear(8, 8)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "spare"], task_type="CAUSAL_LM"))
    layers = lora_layers(model)
    before = {name: LowRank(torch.ones(x.out_features, 4), torch.ones(4, x.in_features)) for name, x in layers.items()}
    penalty = L2(weight=1.0)
    penalty.prepare(Context(2, before, live=Live(layers, "default")))
    trainer = make_trainer("llama", sys.argv[1], 4, 2, penalty, model=model, max_steps=2, learning_rate=0.1)
    trainer.train()
    moved = layers["model.spare"].lora_B["default"].weight
    assert bool((moved != 0).all())
    print("both steps were made")
    del trainer
    shut_down()
