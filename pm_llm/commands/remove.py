"""`pm-llm remove`: a run's adapter without one task's part."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "remove",
        help="write a run's adapter without one task's part",
        description="Write the merged adapter without what one task has added to it, where the merge is a sum with "
        "coefficients, and score it on the test rows that the run keeps. The run stays as it is.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the adapter; must not exist")
    parser.add_argument("--dtype", help="of its weights: float32 (the default), bfloat16 or float16")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm remove`: the adapter, how exact it is, and each task's score with and without the part."""
    from pm_llm.config import configured
    from pm_llm.evaluation.answering import evaluate_adapter
    from pm_llm.run.folder import RunDir
    from pm_llm.run.kept import read_all
    from pm_llm.run.taking_back import remove
    from pm_llm.system.quiet import quiet_libraries

    quiet_libraries()
    run_dir = RunDir.open(given.run_dir)
    RunDir.check_within(given.out)
    made = remove(run_dir, given.task, given.out, given.dtype)
    print(f"{given.out}: rank {made.rank}, relative truncation error {made.error:.3e}")
    print(f"the run's own adapter is {made.own_error:.3e} from the sum of its parts")
    state = run_dir.state()
    tasks = {task.name: task for task in read_all(run_dir, state["stages"]) if task.test}
    if not tasks:
        print("not scored: the run keeps no test rows (keep_test_rows is false)")
        return 0
    config = configured(state["config"], None, str(run_dir.path))
    before = {name: found["score"] for name, found in state["stages"][-1].scores.items()}
    missing = {name: task for name, task in tasks.items() if name not in before}  # the last stage may not be scored
    if missing:
        before |= {one.task: one.score() for one in evaluate_adapter(str(run_dir.adapter), config, missing)}
    after = {one.task: one.score() for one in evaluate_adapter(given.out, config, tasks)}
    print("\n| task | with it | without it |\n|---|---:|---:|")
    for name in tasks:
        print(f"| {name} | {before[name]:.1f} | {after[name]:.1f} |")
    return 0
