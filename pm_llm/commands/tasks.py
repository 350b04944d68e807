"""`pm-llm tasks`: look at tasks before training on them."""

from __future__ import annotations

import argparse
from typing import Any

from pm_llm.commands.keys import add_keys, config_of


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    tasks = commands.add_parser("tasks", help="look at tasks before training on them")
    parser = tasks.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "check",
        help="sizes, label balance, token lengths, shared rows, examples",
        description="Print what a run would train on, or everything that is wrong with it, with file and line. "
        "Tasks are given as files or dataset ids, or by --config, --benchmark, --order, --data_dir, --tasks ...; "
        "--model names the tokenizer.",
        usage="pm-llm tasks check [TASK ...] [--config RECIPE.YAML] [--KEY VALUE ...]",
    )
    add_keys(parser)
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm tasks check`: what a run would train on."""
    config = config_of(given)
    from pm_llm.tasks.check import describe_tasks

    print(describe_tasks(config))
    return 0
