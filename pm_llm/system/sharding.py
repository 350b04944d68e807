"""Models whose parameters are shared out over the processes (DeepSpeed's ZeRO-3, FSDP2)."""

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

from pm_llm.errors import PmLlmError

# what DeepSpeed's checkpoints hold besides tensors and plain values
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def launched() -> tuple[bool, bool]:
    """Whether `accelerate launch` asked for sharded parameters (FSDP2, ZeRO-3), and whether for DeepSpeed at all.

    Raises:
        PmLlmError: If it asked for the first version of FSDP.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise PmLlmError("FSDP's first version is not supported. Use fsdp2.yaml, or set fsdp_version to 2.")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    zero3 = deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero3 or fsdp, deepspeed


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the parameters."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


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
