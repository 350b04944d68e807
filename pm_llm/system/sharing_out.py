"""The base model's weights shared out over the processes (FSDP2), the adapters whole in each.

`accelerate launch` with `fsdp2.yaml` asks for it. Accelerate would share out adapters too, and only while the Trainer
runs; here a run's model is shared out once, as it is loaded, group by group (a transformer block is a group): no
process ever holds all of it. A group's weights are gathered when the forward or the backward pass reaches it. To the
Trainer it is a run of several processes (DDP) with frozen weights that it need not know of. So whatever needs the
adapter works: penalties, merges, constraints around the optimizer's step. And the Fisher, losses and scores are
measured where the model lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pm_llm.errors import PmLlmError
from pm_llm.system.processes import process_state

ASKED = "PM_LLM_SHARE_OUT"  # what is noted in place of accelerate's own word
WRAPS = "TRANSFORMER_BASED_WRAP"


def take_over() -> None:
    """Let the model be shared out here where `accelerate launch` asked for FSDP2, and accelerate know nothing of it.

    Raises:
        PmLlmError: If it asked for the first version, or for what is not done here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise PmLlmError("FSDP's first version is not supported. Use fsdp2.yaml, or set fsdp_version to 2.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", WRAPS) != WRAPS:
        raise PmLlmError(f"fsdp_auto_wrap_policy must be {WRAPS}: each transformer block is a group.")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        raise PmLlmError("fsdp_activation_checkpointing is true. Set train.gradient_checkpointing instead.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise PmLlmError("fsdp_offload_params is true: adapters would lie apart from their layers. Set it to false.")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise PmLlmError("fsdp_ignored_modules is set; all of the base model is shared out. Leave it out.")
    os.environ[ASKED] = os.environ.pop("ACCELERATE_USE_FSDP")


def is_asked() -> bool:
    """Whether models are to be shared out."""
    return os.environ.get(ASKED) == "true"


def is_shared_out(model: nn.Module) -> bool:
    """Whether a model's base is."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def share_out(model: Any, fill: Callable[[nn.Module], Any]) -> None:
    """Share out a model whose parameters may be without values, group by group.

    Args:
        model: A decoder of transformers.
        fill: Puts what is left of a module onto this process's device with its values.
    """
    device = process_state().device
    mesh = torch.distributed.init_device_mesh(device.type, (process_state().num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    for module in _groups(model):
        fill(module)
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    model.eval()
    # what the first pass gathers into is used ever after: in inference mode no later pass could train with it
    _idle(model)


def _groups(model: Any) -> Iterator[nn.Module]:
    """The blocks, embeddings that are not tied, and at last the whole with what is left."""
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    blocks = set(given.split(",")) if given else set(model._no_split_modules or ())
    read, said = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {read, said} if said is not None and read.weight is not said.weight else set()
    found = [module for module in model.modules() if type(module).__name__ in blocks or module in apart]
    if not any(type(module).__name__ in blocks for module in found):
        raise PmLlmError(
            f"{type(model).__name__} has no block {sorted(blocks)}: it cannot be shared out. Use ddp.yaml."
        )
    yield from found
    yield model


def called_through(peft_model: Any) -> None:
    """PEFT calls a base model's `forward`, past the hooks that gather weights: let it call the model."""
    inner = peft_model.base_model
    if isinstance(inner, BaseTuner) and is_shared_out(inner):  # not so the virtual tokens of prompt learning
        vars(inner)["forward"] = lambda *args, **kwargs: inner.model(*args, **kwargs)


def hide_from_ddp(model: nn.Module) -> None:
    """The Trainer's DDP is to see the adapters only."""
    if not is_shared_out(model):
        return
    names = [n for n, p in model.named_parameters() if not p.requires_grad] + [n for n, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@contextmanager
def in_step(model: Any, idle: Callable[[], Any] | None = None) -> Iterator[None]:
    """Within the block each process may pass its own rows, as many as it has.

    Gathering a group takes all processes. So every pass says that it is one; and a process that has come to the end of
    the block makes passes that count for nothing (`idle`; by default forward, of one token) while another says so.
    """
    if not is_shared_out(model):
        yield
        return
    device = process_state().device
    root: Any = next(module for module in model.modules() if isinstance(module, FSDPModule))
    handle = root.register_forward_pre_hook(lambda *_: _working(device, True), prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while _working(device, False):
        _idle(model) if idle is None else idle()


def _idle(model: Any) -> None:
    """A forward pass that counts for nothing."""
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=process_state().device), use_cache=False)


def _working(device: torch.device, mine: bool) -> bool | None:
    """Tell all processes whether this one makes a pass; one that does not learns whether any does."""
    told = torch.tensor(float(mine), device=device)
    torch.distributed.all_reduce(told)
    return None if mine else bool(told)
