"""`pm-llm gate`: whether a run's last task may go out."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "gate",
        help="say whether the last task cost more than it may, by exit status",
        description="Compare each earlier task with what it was after its own stage, and each probe with what it was "
        "before training, on the same rows with paired intervals. Exit status 0: nothing lost more than --lose beyond "
        "its noise; 3: something did; 4: the last task did not gain --gain.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--lose", type=float, default=2.0, help="points that may be lost, of a perplexity percent (2)")
    parser.add_argument("--gain", type=float, help="points that the last task must have gained (not looked at)")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals, over all that is guarded (0.95)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm gate`: a line a task, and the exit status."""
    from pm_llm.errors import check_number
    from pm_llm.report.gate import Course, judge, status_of
    from pm_llm.run.folder import RunDir

    check_number("--lose", given.lose, 0)
    check_number("--level", given.level, 0.5, 0.9999)
    run = Course.of(RunDir.open(given.run_dir))
    verdicts = judge(run, given.lose, given.gain, given.level)
    status = status_of(verdicts)
    if given.json:
        plain = {
            "status": status,
            "verdicts": [one.plain() for one in verdicts],
            "not_guarded": run.warnings(given.level),
        }
        print(json.dumps(plain, indent=1))
    else:
        print("\n".join(one.line() for one in verdicts) or "nothing is guarded yet: it is the first task")
        for line in run.warnings(given.level):
            print(line)
    return status
