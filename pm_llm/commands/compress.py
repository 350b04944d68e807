"""`pm-llm compress`: make a stored adapter small."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "compress",
        help="make a stored adapter small, or an ordinary one again",
        description="Write an adapter with fewer ranks and bits, module by module within a budget, and say what that "
        "costs; with --expand make an ordinary PEFT adapter of a compressed one.",
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, or the compressed one")
    parser.add_argument("--budget", type=float, default=0.25, help="share of its bytes (default: 0.25)")
    parser.add_argument("--expand", action="store_true", help="make an ordinary adapter again")
    parser.add_argument("--dtype", help="with --expand: of its weights, float32 (the default), bfloat16 or float16")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result; must not exist")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm compress`: what each module was cut to, and what was lost."""
    from pm_llm.adapters.compression import compress, expand
    from pm_llm.run.folder import RunDir
    from pm_llm.system.files import size_of

    RunDir.check_within(given.adapter)
    if given.expand:
        expand(given.adapter, given.out, given.dtype)
        print(given.out)
        return 0
    damage = compress(given.adapter, given.out, given.budget)
    for name, error in damage.errors.items():
        print(f"{name}\trank {damage.ranks[name]}\t{damage.bits[name]} bits\trelative error {error:.3f}")
    print(f"{given.out}: {size_of(damage.before)} -> {size_of(damage.after)}, relative error {damage.error:.3f}")
    return 0
