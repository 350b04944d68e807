"""`pm-llm add`: train the next task of a run."""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import Any

from pm_llm.commands.keys import parse_overrides
from pm_llm.commands.run import train
from pm_llm.system.quiet import quiet_libraries


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "add",
        help="train the next task of a finished run",
        description="Train one task more, or several, after those that a run has finished, with the run's own "
        "settings. A task is a file, a folder, a dataset id, a mapping as in `tasks`, or a name of the run's "
        "benchmark. `train` keys, and those that choose rows, may be given as flags (--train.learning_rate 1e-4).",
        usage="pm-llm add [-h] RUN_DIR TASK [TASK ...] [--KEY VALUE ...]",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.set_defaults(call=call, keys=True)


def call(given: argparse.Namespace) -> int:
    """`pm-llm add`: train, then print the matrix and what follows from it."""
    words = list(takewhile(lambda word: not word.startswith("-"), given.rest))
    keys = parse_overrides(given.rest[len(words) :])
    tasks = parse_overrides(["--tasks", *words])["tasks"] if words else []
    quiet_libraries()
    from pm_llm.sequence import ContinualSequence

    sequence = ContinualSequence.open(given.run_dir, keys)
    return train(sequence, lambda: sequence.add(*tasks))
