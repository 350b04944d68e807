"""`pm-llm vector`: the difference of two models as an adapter."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "vector",
        help="write the difference of two models as a LoRA adapter",
        description="Write the difference of two models, such as an instruction-tuned one and its base, as a LoRA "
        "adapter of the base: to fold in with merge, or for `merge: {name: transfer, adapter: DIR}`.",
    )
    parser.add_argument("--base", required=True, metavar="DIR_OR_ID", help="the model that the vector is relative to")
    parser.add_argument("--tuned", required=True, metavar="DIR_OR_ID", help="the other model, of the same shapes")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapter (default: 64)")
    parser.add_argument("--target-modules", nargs="+", help="as lora.target_modules (default: q and v projections)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the adapter; must not exist")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm vector`: the difference, and how much of it the rank leaves out."""
    from pm_llm.merges.files import write_task_vector
    from pm_llm.run.folder import RunDir

    RunDir.check_within(given.out)
    error, names, share = write_task_vector(given.base, given.tuned, given.rank, given.target_modules, given.out)
    print(f"{given.out}: rank {given.rank}, relative truncation error {error:.3e}")
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        print(f"left out: {share:.1%} of the squared change, in {shown}. --target-modules says what is taken.")
    return 0
