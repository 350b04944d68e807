"""What is trained, shared out over the processes: by DeepSpeed's ZeRO-3, or by FSDP2 around a Trainer of one's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.serialization import safe_globals

# what DeepSpeed's checkpoints hold besides tensors and plain values
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def launched() -> tuple[bool, bool]:
    """Whether `accelerate launch` asked for DeepSpeed's ZeRO-3, and whether for DeepSpeed at all."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3", deepspeed


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of what is trained."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters() if p.requires_grad)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within the block, ZeRO-3's parameters are whole; every process must enter it."""
    shared = [p for p in parameters if hasattr(p, "ds_id")]
    return sys.modules["deepspeed"].zero.GatheredParameters(shared) if shared else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of FSDP2, from all processes' parts; every process must ask for it. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def weights_only() -> Iterator[None]:
    """Within the block, `torch.load` makes nothing but tensors, plain values and the classes above, whoever calls it.

    DeepSpeed loads its checkpoints as pickles otherwise, which may run any code.
    """
    before, known = os.environ.get(FORCE), []
    if "deepspeed" in sys.modules:
        for module, _, name in (path.partition(":") for path in DEEPSPEED_CLASSES):
            known.append(getattr(importlib.import_module(module), name))
    os.environ[FORCE] = "1"
    try:
        with safe_globals(known):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
