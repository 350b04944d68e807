"""Which process this is, out of how many, under any accelerate launcher."""

from __future__ import annotations

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Accelerate's state of this process. Without an accelerator it must be told so, or it sees one process."""
    return PartialState(cpu=not torch.accelerator.is_available())


def shut_down() -> None:
    """Wait for the other processes and close the connections; left open, gloo's threads can abort a process at exit."""
    state = process_state()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
