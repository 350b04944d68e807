"""Tasks from a configuration: benchmarks, files, datasets of the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.tasks.base import Task, check_while, distinct, one_direction
from pm_llm.tasks.problems import Problems

if TYPE_CHECKING:
    from pm_llm.config import RunConfig

# benchmark name -> module with ORDERS, TASKS (all names) and `load_task(name, data_dir, problems) -> Task`
BENCHMARKS = {
    "embedded": "pm_llm.tasks.benchmarks.embedded",
    "standard_cl": "pm_llm.tasks.benchmarks.standard_cl",
    "long_sequence": "pm_llm.tasks.benchmarks.long_sequence",
    "superni": "pm_llm.tasks.benchmarks.superni",
    "trace": "pm_llm.tasks.benchmarks.trace",
}


def load_tasks(config: RunConfig) -> list[Task]:
    """The tasks of a run, in the order they are trained, checked and cut to `max_train_samples`, `max_test_samples`.

    With `repeat` a task occurs several times. With `evaluation.split: validation` the `test` rows are the validation
    rows.

    Raises:
        PmLlmError: If neither or both of `benchmark` and `tasks` are given, a name is unknown or occurs twice, or with
            everything that is wrong with files and rows, each with file and line.
    """
    from pm_llm.tasks.order import blurred, pick_order

    if (config.benchmark is None) == (not config.tasks):
        raise PmLlmError("give either `benchmark` (with `order`) or `tasks` (files or dataset ids), and not both.")
    problems = Problems(drop=config.bad_rows == "drop")
    if config.benchmark is not None:
        module = load_benchmark(config.benchmark)
        names = pick_order(config.order, module.ORDERS, list(module.TASKS))
        tasks = {
            name: check_while(problems, partial(module.load_task, name, config.data_dir))
            for name in dict.fromkeys(names)
        }
    else:
        from pm_llm.tasks.user import load_user_tasks

        own = load_user_tasks(config.tasks, Path(config.data_dir) if config.data_dir else None, problems)
        tasks = {task.name: task for task in own}
        if len(tasks) != len(own):
            raise PmLlmError(
                f"two tasks have one name: {', '.join(task.name for task in own)}. Give each its own `name`."
            )
        names = pick_order(config.order, {"as given": list(tasks)}, list(tasks))
    if config.evaluation.split == "validation":
        tasks = {name: _on_validation(task, problems) for name, task in tasks.items()}
    problems.tell()
    one_direction(tasks.values())
    cut = {
        name: task.subset(config.max_train_samples, config.max_test_samples, config.seed)
        for name, task in tasks.items()
    }
    return blurred([cut[name] for name in names * config.repeat], config.blur, config.seed)


def load_probes(config: RunConfig) -> list[Task]:
    """The tasks that are scored and never trained. Raises PmLlmError as :func:`load_tasks` does."""
    from pm_llm.tasks.user import load_user_tasks

    problems = Problems(drop=config.bad_rows == "drop")
    folder = Path(config.data_dir) if config.data_dir else None
    tasks = load_user_tasks(config.probes, folder, problems, probe=True)
    problems.tell()
    return [task.subset(None, config.max_test_samples, config.seed) for task in tasks]


def scored(config: RunConfig, tasks: Sequence[Task]) -> dict[str, Task]:
    """Name -> task of all that a run of `tasks` scores: these, and the probes after them.

    Raises:
        PmLlmError: If a name is taken twice, their scores cannot be averaged, or as :func:`load_tasks` does.
    """
    trained, probes = distinct(tasks), load_probes(config)
    found = trained | {task.name: task for task in probes}
    if len(found) < len(trained) + len(probes):
        raise PmLlmError("a probe has the name of a task or of another probe. Give each its own `name`.")
    one_direction(found.values())
    return found


def load_benchmark(name: str) -> Any:
    """The benchmark's module. Raises PmLlmError if there is none of that name."""
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return importlib.import_module(BENCHMARKS[name])


def _on_validation(task: Task, problems: Problems) -> Task:
    if not task.validation:
        problems.add(
            "", f"task {task.name!r} has no validation rows. Score the test rows, or give your own task some."
        )
    return replace(task, test=task.validation)
