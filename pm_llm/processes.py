"""Which process this is, out of how many, under any accelerate launcher."""

from __future__ import annotations

import gc
import resource
import sys
import time

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Accelerate's state of this process. Without an accelerator it must be told so, or it sees one process."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class Clock:
    """Seconds of each part of a stage, and the peak of memory.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.monotonic()

    def stop(self, part: str) -> None:
        """The time since the last stop was that of `part`."""
        now = time.monotonic()
        self.seconds[part] = now - self._last
        self._last = now

    def peak_memory(self) -> int:
        """Bytes: the device's peak since the clock was made, on CPU the process's peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


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
