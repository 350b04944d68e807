"""Which process this is, out of how many, under any accelerate launcher."""

from __future__ import annotations

import gc

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Accelerate's state of this process. Without an accelerator it must be told so, or it sees one process."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def shut_down() -> None:
    """Wait for the other processes and close the connections.

    A gloo group that is still alive when the interpreter ends now and then aborts the process ("terminate called
    without an active exception"), and a wrapped model keeps its group alive: drop the Trainer first.
    """
    state = process_state()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
        gc.collect()  # a Trainer is full of cycles
