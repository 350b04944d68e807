"""`pm-llm score`: score saved predictions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "score",
        help="score saved predictions, without the model",
        description="Score saved predictions again: those after a run's last task, or of one file.",
    )
    parser.add_argument("predictions", metavar="RUN_DIR_OR_FILE")
    parser.add_argument("--scorer", help="another scorer than the tasks' own")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm score`: scores of saved predictions."""
    from pm_llm.evaluation.intervals import score_lines
    from pm_llm.evaluation.predictions import read_all
    from pm_llm.run.folder import RunDir

    paths, tasks, unkept = [Path(given.predictions)], None, False
    if paths[0].is_dir():
        run_dir = RunDir.open(paths[0])
        state = run_dir.state()
        stages, unkept = state["stages"], not state["config"]["keep_test_rows"]
        known = bool(stages) and stages[-1].facts.knows_task
        tasks = [] if known else state["tasks"]  # no mean of what its result is not used for
        paths = run_dir.predictions(len(stages) - 1)
    found = read_all(paths)
    if not found:
        why = "keep_test_rows is false" if unkept else "nothing has been scored yet"
        raise PmLlmError(f"{given.predictions} holds no predictions: {why}.")
    print("\n".join(score_lines(list(found.values()), given.scorer, tasks)))
    return 0
