"""`pm-llm restore`: make an earlier stage of a run the current one."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "restore",
        help="make an earlier task's stage the current one of a run",
        description="Make an earlier task's stage the current one: its adapter, its results, and where `add` goes on. "
        "The tasks after it stay in the folder, and can be restored, until another task is trained.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--to", required=True, metavar="TASK", help="the task, by name or number")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm restore`: the stage, scored if it was not, and its results."""
    from pm_llm.report.tables import describe
    from pm_llm.run.folder import RunDir
    from pm_llm.run.record import Results
    from pm_llm.run.taking_back import restore
    from pm_llm.sequence import ContinualSequence
    from pm_llm.system.quiet import quiet_libraries

    quiet_libraries()
    run_dir = RunDir.open(given.run_dir)
    with run_dir.locked():
        gone = restore(run_dir, given.to)
    print(describe(Results.of(ContinualSequence.open(given.run_dir).conclude())))
    back = f"; pm-llm restore {given.run_dir} --to {gone[-1]} brings them back" if gone else ""
    print(f"\n{given.run_dir} is after task {given.to}; taken back: {', '.join(gone) or 'none'}{back}")
    return 0
