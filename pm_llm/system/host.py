"""Tensors from a device to the CPU, many in one copy: Python waits for the device once, not once a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
MOST = 2**28  # bytes that are copied together


def to_host(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The tensors on the CPU, those that are there already as they are; one wait for each device, type and `MOST`
    bytes, which are held twice on the device meanwhile."""
    groups: dict[tuple[torch.device, torch.dtype, int], list[Key]] = defaultdict(list)
    size = 0
    for key, x in tensors.items():
        size += x.nbytes
        groups[x.device, x.dtype, size // MOST].append(key)
    found = dict(tensors)
    for (device, *_), keys in groups.items():
        if device.type == "cpu":
            continue
        flat = torch.cat([tensors[key].detach().flatten() for key in keys]).cpu()
        parts = flat.split([tensors[key].numel() for key in keys])
        found |= {key: x.clone().view(tensors[key].shape) for key, x in zip(keys, parts, strict=True)}
    return found
