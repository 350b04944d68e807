"""What is put around the stack while a Trainer is made and run, and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from trl.trainer import utils as trl_utils


@contextmanager
def answers_only() -> Iterator[None]:
    """Within the block, TRL's fused head scores the answer's positions only, on CPU too.

    On GPUs it does so by itself. Elsewhere it scores every position and drops the prompt's, which is half of a small
    model's step: `benchmarks/step.py --dtype bfloat16` on SmolLM2 gave 2.7 s before and gives 1.4 s since.
    """
    before = getattr(trl_utils, "_use_triton", None)
    if before is not None:
        trl_utils._use_triton = lambda device: device.type == "cpu" or before(device)
    try:
        yield
    finally:
        if before is not None:
            trl_utils._use_triton = before


@contextmanager
def original_forward(model: nn.Module) -> Iterator[None]:
    """Around the making and running of a Trainer: take back what it hangs on `forward`, module by module.

    TRL adds a fused head and accelerate autocast; in a sequence every task would wrap the wrapper of the one before.
    Accelerate's mark goes too: a model that has it is trained without autocast, so bfloat16 would hold for the first
    task of a process only.
    """
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    whole_model: Any = model
    config = whole_model.config.get_text_config()
    routed = {
        key: getattr(config, key) for key in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, key)
    }
    try:
        yield
    finally:
        for key, value in routed.items():  # TRL turns a mixture of experts' on, with which it cannot generate
            setattr(config, key, value)
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
        for mark in ("_is_accelerate_prepared", "_original_forward"):
            model.__dict__.pop(mark, None)
