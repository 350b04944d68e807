"""Models whose parameters are shared out over the processes (DeepSpeed's ZeRO-3, FSDP2)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the parameters."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Within the block, ZeRO-3's parameters are whole; every process must enter it."""
    shared = [p for p in parameters if hasattr(p, "ds_id")]
    return sys.modules["deepspeed"].zero.GatheredParameters(shared) if shared else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of FSDP2, from all processes' parts; every process must ask for it. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
