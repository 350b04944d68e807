"""Where large sums live: in memory, or in files mapped into it, whose pages the system may write out and drop."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

Zeros = Callable[..., Tensor]  # shape -> a float32 tensor of zeros on CPU


def mapped_files(folder: Path) -> Zeros:
    """Zeros in files below `folder`. They have no name: when their tensor or the process is gone, so are they."""

    def zeros(*shape: int) -> Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder)
        try:
            os.posix_fallocate(handle, 0, 4 * prod(shape))  # a full disk is an error here, not a signal later
            return torch.from_file(path, shared=True, size=prod(shape), dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)

    return zeros
