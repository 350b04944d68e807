"""Commands in forks of one warm process; see `forker.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """How a command ended: its exit status (-9: killed), seconds, and what it printed."""

    status: int
    seconds: float
    said: str


class Forker:
    """Runs commands in forked processes of one that has imported all they need."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        """Start the one process; what libraries read of their environment as they are imported is in `env`."""
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.helpers.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"},
        )

    def __call__(
        self,
        *argv: object,
        what: str = "pm-llm",
        kill: float | None = None,
        when: str = "",
        number: int = signal.SIGKILL,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> Ended:
        """Run `pm-llm ARGV`, and send a signal after `kill` seconds, or as soon as a path like `when` is there.

        With `what="launch"` it is `accelerate launch ARGV` whose ranks are forks, too; with `"script"`, `python ARGV`.
        """
        self.log.write_text("")
        job = {
            "what": what,
            "argv": [str(word) for word in argv],
            "log": str(self.log),
            "cwd": str(cwd),
            "env": env or {},
            "kill": kill,
            "when": when,
            "signal": int(number),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["status"], answer["seconds"], self.log.read_text())

    def __enter__(self) -> Forker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
