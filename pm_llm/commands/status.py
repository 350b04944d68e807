"""`pm-llm status`: where a run stands."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("status", help="show where a run stands and what it will do next")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """Print it."""
    from pm_llm.run.status import describe_run

    print(describe_run(given.run_dir))
    return 0
