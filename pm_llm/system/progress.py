"""Progress bars: one for the sequence, one within each stage; silent where the output is no terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from pm_llm.errors import nobody_listens
from pm_llm.system.processes import process_state


def bar(total: int | None, label: str, unit: str) -> Any:
    """A bar that disappears when it is done; on the main process only."""
    disable = True if not process_state().is_main_process else None
    return tqdm(total=total, desc=label, unit=unit, leave=False, disable=disable)


def say(line: str) -> None:
    """One line above the bars, from the main process; a terminal gets it broken between words. Nobody may be listening
    any more: that decides nothing."""
    if process_state().is_main_process:
        try:
            tqdm.write(_broken(line) if sys.stdout.isatty() else line)
            sys.stdout.flush()
        except BrokenPipeError:
            nobody_listens()


def _broken(text: str) -> str:
    width = shutil.get_terminal_size().columns
    breaking = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= width else breaking.fill(line) for line in text.splitlines())


class TrainingBar(TrainerCallback):
    """Shows steps and loss of a training stage."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar(state.max_steps, self.label, "step")
        self.bar.update(state.global_step)  # where training goes on from a checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
