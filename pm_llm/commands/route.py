"""`pm-llm route`: send each prompt to the adapter it looks like."""

from __future__ import annotations

import argparse
from itertools import zip_longest
from typing import Any

from pm_llm.system.quiet import quiet_libraries


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "route",
        help="score a run's task adapters with each prompt sent to those it looks like, instead of merging",
        description="Score the task adapters of a finished run (start alone, as the preset per_task): each prompt "
        "is answered with the adapter whose training prompts are nearest in the base model's hidden states, or PEFT's "
        "Arrow mixes the adapters token by token.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--router", default="nearest", help="nearest (default) or arrow")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm route`: one line a task with the share that went to its own adapter, the mean, and the memory."""
    from pm_llm.evaluation.intervals import score_lines

    quiet_libraries()
    from pm_llm.evaluation.routing import route
    from pm_llm.system.files import size_of

    found = route(given.run_dir, given.router)
    lines = score_lines(found.predictions)
    shares = [f"\trouted right {share:.0%}" for share in found.right]
    print("\n".join(line + share for line, share in zip_longest(lines, shares, fillvalue="")))
    print(f"kept: {size_of(found.kept_bytes)}")
    return 0
