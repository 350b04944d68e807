"""Runs commands in forked processes that can be killed, without importing everything anew for each.

Reads a JSON object a line: `what` (a name of RUN), `argv`, `log` (file for what it prints), `cwd`, `env` (added to its
own), `kill` (seconds after which it gets `signal`).
Answers `{"status": ..., "seconds": ...}`, the status as `os.waitstatus_to_exitcode` gives it (-9: killed).
"""

import contextlib
import gc
import glob
import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser

import pm_llm
from pm_llm.cli import main

for _path in sorted(Path(pm_llm.__path__[0]).rglob("*.py")):  # what a command would import, once for all of them
    _name = ".".join(_path.relative_to(Path(pm_llm.__path__[0]).parent).with_suffix("").parts)
    if not _name.endswith("__main__"):
        importlib.import_module(_name.removesuffix(".__init__"))


def launch(argv: list[str]) -> None:
    """`accelerate launch`, whose ranks torchrun starts as forks of this process."""
    given = launch_command_parser().parse_args(argv)
    given.run_path, given.start_method = True, "fork"  # torchrun's own options
    launch_command(given)


def script(argv: list[str]) -> None:
    """`python SCRIPT ARGUMENTS`."""
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


RUN = {"pm-llm": main, "launch": launch, "script": script}


def child(what: str, argv: list[str], log: str, cwd: str, env: dict[str, str]) -> None:
    """Become a process of its own that runs one command."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        status = RUN[what](argv) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or every collection in a child goes through all that is imported, and copies its pages
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job["what"], job["argv"], job["log"], job["cwd"], job["env"])
        if job["kill"] is not None:
            while time.monotonic() - started < job["kill"] and not os.waitid(
                os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                if job["when"] and glob.glob(job["when"]):
                    break
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, job["signal"])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    serve()
