"""`pm-llm merge`: fold adapters into one, exactly."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("merge", help="fold one LoRA adapter into another, exactly")
    parser.add_argument("--running", required=True, metavar="DIR", help="the adapter to fold into")
    parser.add_argument(
        "--new", required=True, metavar="DIR", nargs="+", action="extend", help="the adapter to add, or several"
    )
    parser.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        action="extend",
        metavar="X",
        help="weight of the new adapter: one for all, or one each (default: 1)",
    )
    parser.add_argument("--max-rank", type=int, help="truncate the result to this rank (default: exact)")
    parser.add_argument("--dtype", help="of its weights: float32, bfloat16 or float16 (default: as the inputs)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result; must not exist")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm merge`: fold, write, and say how exact it is."""
    from pm_llm.merges.files import merge_folders
    from pm_llm.run.folder import RunDir

    for folder in (given.running, *given.new):
        RunDir.check_within(folder)
    report = merge_folders(
        given.running, given.new, given.coefficient or [1.0], given.max_rank, given.out, given.dtype
    )
    print(f"{given.out}: rank {report.rank}, relative truncation error {report.truncation_error:.3e}")
    return 0
