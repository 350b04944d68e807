"""Which process this is, out of how many, under any accelerate launcher."""

from __future__ import annotations

import gc
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from torch import Tensor

from pm_llm.errors import PmLlmError

RESET_PEAK = Path("/proc/self/clear_refs")  # on Linux


def process_state() -> PartialState:
    """Accelerate's state of this process. On a machine without an accelerator PartialState needs `cpu=True`: otherwise
    it takes every process for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def total(x: Tensor) -> Tensor:
    """The sum over all processes, on this one's device; with one process `x` itself."""
    state = process_state()
    return reduce(x.to(state.device), "sum") if state.num_processes > 1 else x


def on_main(action: Callable[[], Any]) -> Any:
    """What `action` gives on the main process, on every process; if it fails there, all stop with that error."""
    box: list[Any] = [None, None]
    state = process_state()
    failed: BaseException | None = None
    if state.is_main_process:
        try:
            box[1] = action()
        except Exception as error:
            failed, box[0] = error, str(error)
    if state.num_processes > 1:
        broadcast_object_list(box)
    if failed is not None:
        raise failed
    if box[0] is not None:
        raise PmLlmError(box[0])
    return box[1]


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process, or the way to it, is what failed. Gloo's errors have no type of their own; they name
    the file of its source."""
    of_nccl = getattr(torch.distributed, "DistError", ())
    return isinstance(error, of_nccl) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


class Clock:
    """Seconds of each part of a stage, and each part's peak of memory in bytes: the device's, on CPU the process's.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}
        self._begin()

    def stop(self, part: str) -> None:
        """The time since the last stop was that of `part`, or of more of it."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - self._last
        self.peak_memory[part] = max(self.peak_memory.get(part, 0), self._peak())
        self._begin()

    def _begin(self) -> None:
        self._last = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET_PEAK.exists() and os.access(RESET_PEAK, os.W_OK):
            RESET_PEAK.write_text("5")  # see proc(5): the peak becomes what is resident now

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if RESET_PEAK.exists():
            return int(re.findall(r"VmHWM:\s+(\d+) kB", RESET_PEAK.with_name("status").read_text())[0]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process so far
        return peak if sys.platform == "darwin" else peak * 1024


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
