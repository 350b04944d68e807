"""The running adapter inside the base weights while a task trains: nothing of it is left to compute in a step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pm_llm.adapters.live import RUNNING, TASK, lora_layers, set_active
from pm_llm.errors import PmLlmError
from pm_llm.system.mapped import Zeros
from pm_llm.system.sharing_out import is_asked

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IN_MEMORY = 4 * 2**30  # bytes of base weights that are copied in memory; the copy of more is mapped from files
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # set by accelerate launch


def why_not(model: nn.Module) -> str | None:
    """What keeps the running adapter from being folded into this model's weights; None: nothing."""
    if is_asked() or any(os.environ.get(name, "false") == "true" for name in SHARDING):
        return "the launcher shards the weights"
    used = Counter(
        id(p) for module in model.modules() for p in module.parameters(recurse=False)
    )  # a tied weight is used by several modules
    layers: dict[str, Any] = dict(lora_layers(model))
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or weight.ndim != 2 or weight.dtype not in PLAIN:
            return f"the weights of {name} are quantised"
        if used[id(weight)] > 1:
            return f"the weights of {name} are shared with another layer"
    return None


def _copied(weight: Tensor, zeros: Zeros) -> Tensor:
    """A copy of any type where `zeros` makes float32."""
    room = zeros(-(-weight.nbytes // 4)).view(torch.uint8)[: weight.nbytes]
    return room.view(weight.dtype).view(weight.shape).copy_(weight)


@contextmanager
def folded(model: Any, mode: str, zeros: Zeros = torch.zeros) -> Iterator[None]:
    """Within the block, `W0 + s B A` of the frozen running adapter stands in the base weights, and the task adapter
    alone is active; afterwards the weights are bit by bit what they were, from a copy on the CPU.

    The sum is made in float32 and rounded once, to the weights' own type.

    Args:
        model: A PeftModel; without an active running adapter nothing is done.
        mode: `auto` (if it can be done), `always` or `never`.
        zeros: How the copy is made where it is larger than `IN_MEMORY`, see :mod:`pm_llm.system.mapped`.

    Raises:
        PmLlmError: With `always`, if it cannot be done (with a running adapter or without); it says why.
    """
    reason = why_not(model) if mode != "never" else "it was not asked for"
    if mode == "always" and reason is not None:
        raise PmLlmError(f"fold_running is 'always', but {reason}. Set it to auto or never.")
    if reason is not None or model.active_adapters != [RUNNING, TASK]:
        yield
        return
    layers: dict[str, Any] = dict(lora_layers(model))
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    large = sum(weight.nbytes for weight in weights.values()) > IN_MEMORY
    try:
        before: dict[str, Tensor] = {
            name: _copied(weight.detach(), zeros) if large else weight.detach().to("cpu", copy=True)
            for name, weight in weights.items()
        }
    except OSError:  # a full disk: nothing has been changed yet
        if mode == "always":
            raise
        yield
        return
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = weights[name]
                weight.copy_(weight.float() + layer.get_delta_weight(RUNNING).float())
        set_active(model, [TASK], trainable=TASK)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
        set_active(model, [RUNNING, TASK], trainable=TASK)
