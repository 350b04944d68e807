"""SIGTERM and SIGINT: training stops after a checkpoint, all else at once; what is committed stays."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from pm_llm.system.processes import process_state


class Stopped(KeyboardInterrupt):
    """A signal ended the run. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stopping:
    """Turns the first signal into a :class:`Stopped`: at once, or where training is at the end of a step.

    Use as a context manager around the run, and :meth:`gently` around training.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._gentle = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
        # a launcher and a scheduler may both send the one signal
        if not self._gentle or now - self._since > 2:
            raise Stopped(number)

    @contextmanager
    def gently(self) -> Iterator[TrainerCallback]:
        """Within the block, a first signal only takes effect through the callback given; after it, it raises.

        Raises:
            Stopped: After training, if a signal came, on every process.
        """
        callback = _StopTraining(self)
        self._gentle = True
        try:
            yield callback
        finally:
            self._gentle = False
        number = self.agreed()
        if number:
            raise Stopped(number)

    def agreed(self) -> int:
        """A signal that any process has received; 0 if none. All processes must ask at once."""
        number = self.received or 0
        if process_state().num_processes > 1:  # one that stopped alone would leave the others waiting
            numbers = torch.zeros(65, device=process_state().device)
            numbers[number] = 1
            found = reduce(numbers, "sum")[1:].nonzero()
            number = int(found[0]) + 1 if len(found) else 0
        return number


class _StopTraining(TrainerCallback):
    """Ends training after a step, with a checkpoint, when any process has received a signal."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping.agreed():
            control.should_save = control.should_training_stop = True
