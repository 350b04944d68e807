"""`pm-llm run`: train a sequence of tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pm_llm.commands.keys import add_keys, config_of
from pm_llm.config import flags

if TYPE_CHECKING:
    from pm_llm.run.folder import RunDir
    from pm_llm.run.record import Results
    from pm_llm.sequence import ContinualSequence


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "run",
        help="train a sequence of tasks",
        description="Train a sequence of tasks. Any key of the configuration can be given as a flag and overrides "
        "the file; a dot reaches into a section (--lora.r 4). Values are read as YAML.",
        epilog="keys:\n" + "\n".join(f"  --{key}\n        {text}" for key, text in flags()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_keys(parser)
    parser.add_argument(
        "--restart-from", metavar="TASK", help="redo a run from this task on (its name or number), keeping the rest"
    )
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm run`: train, then print the matrix and what follows from it."""
    config = config_of(given)
    from pm_llm.sequence import ContinualSequence

    sequence = ContinualSequence(config, restart_from=given.restart_from)
    return train(sequence, sequence.run)


def train(sequence: ContinualSequence, go: Callable[[], dict[str, Any]]) -> int:
    """Let a sequence go, and print what came out; the exit status."""
    from pm_llm.report.terminal import closing
    from pm_llm.run.record import Results
    from pm_llm.system.processes import shut_down
    from pm_llm.system.progress import say
    from pm_llm.training.stopping import Stopped

    try:
        results = go()
    except Stopped as stop:
        say(f"{stop}; the same command goes on from here. Where that is: pm-llm status {sequence.run_dir.path}")
        return 128 + stop.number
    if sequence.state.is_main_process:
        folder = sequence.run_dir.path
        try:
            draw(sequence.run_dir, Results.of(results))
        except ImportError:  # matplotlib is an extra; the results are there all the same
            say('for a picture of the matrix: pip install "pm_llm[report]"')
        closing(Results.of(results), folder)
    shut_down()
    return 0


def draw(run_dir: RunDir, results: Results) -> None:
    """Write a run's `matrix.png`. Raises ImportError without matplotlib."""
    from pm_llm.report.figures import matrix_png

    with run_dir.locked():
        run_dir.write("matrix.png", matrix_png(results))
