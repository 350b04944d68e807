"""`pm-llm evaluate`: score an adapter on tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pm_llm.commands.keys import add_keys, config_of
from pm_llm.errors import PmLlmError


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "evaluate",
        help="score an adapter on tasks",
        description="Score a PEFT adapter (or the base model alone) on tasks. Further flags are keys of the "
        "configuration, as for run: --model, --benchmark, --order, --data-dir, --tasks ...",
    )
    parser.add_argument("--adapter", metavar="DIR_OR_ID", help="adapter folder or Hub id; none: the base model alone")
    add_keys(parser)
    parser.add_argument("--predictions", metavar="FILE.jsonl", help="keep the predictions, to score them again")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm evaluate`: one line a task with its 95 % bootstrap interval, and their mean (probes aside)."""
    from pm_llm.evaluation.intervals import score_lines

    config = config_of(given)
    from pm_llm.evaluation.answering import evaluate_adapter
    from pm_llm.run.folder import RunDir
    from pm_llm.system.files import jsonl, replace_bytes, writing
    from pm_llm.system.processes import process_state, shut_down
    from pm_llm.system.progress import say
    from pm_llm.tasks.loading import scored, tasks_or_none

    keep = Path(given.predictions) if given.predictions else None
    if keep is not None and (keep.is_dir() or not keep.absolute().parent.is_dir()):
        raise PmLlmError(f"--predictions {keep} is a folder, or in one that does not exist. Name a file.")
    if given.adapter:
        RunDir.check_within(given.adapter)
    stages = tasks_or_none(config)
    found = evaluate_adapter(given.adapter, config, scored(config, stages))
    for line in score_lines(found, tasks=[task.name for task in stages] if stages else None):
        say(line)
    shut_down()
    if keep is not None and process_state().is_main_process:
        with writing(keep):  # whole, or as it was
            replace_bytes(keep, jsonl([line for one in found for line in one.lines()]))
    return 0
