"""`pm-llm` in two processes, the second of which is killed while a checkpoint is written; by accelerate launch."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from pm_llm.cli import main
from pm_llm.system.processes import process_state
from pm_llm.training.checkpoints import Checkpoints


def killed(self: Checkpoints, *_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if process_state().process_index == 1:
        Checkpoints.writing = killed  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
