"""`recipes/continual.py`, which writes how many bytes of parameters a process holds at most: FILE, then the arguments.

Looked at when a group has been loaded and after each block's forward; FILE gets the process's number and a line.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pm_llm.cli import main
from pm_llm.session import Session
from pm_llm.system import sharing_out

MOST = [0, 0]  # bytes held at most, and of the whole base


def held() -> int:
    """Bytes of all parameters that live, their copies that are being gathered included."""
    found = [x for x in gc.get_objects() if isinstance(x, nn.Parameter)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in found]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local if not x.is_meta}.values())


def look(*_: object) -> None:
    MOST[0] = max(MOST[0], held())


def sharing(module: nn.Module, **kwargs: object) -> nn.Module:
    MOST[1] += sum(p.numel() * p.element_size() for p in module.parameters() if not isinstance(p, DTensor))
    look()
    return SHARED(module, **kwargs)


SHARED, sharing_out.fully_shard = sharing_out.fully_shard, sharing
LOAD = Session.load


def load(self: Session) -> None:
    LOAD(self)
    for module in self.model.modules():
        if type(module).__name__ in self.model._no_split_modules:
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)


Session.load = load

if __name__ == "__main__":
    torch.set_num_threads(1)
    file, *arguments = sys.argv[1:]
    status = main(["run", *arguments])
    Path(f"{file}.{os.environ['RANK']}").write_text(f"{MOST[0]} {MOST[1]}")
    sys.exit(status)
