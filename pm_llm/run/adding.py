"""The next task of a run: its configuration, from that of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Task
from pm_llm.tasks.loading import load_benchmark
from pm_llm.tasks.user import task_name, user_tasks


def added(
    config: RunConfig, state: Mapping[str, Any], tasks: Sequence[Task | str | dict[str, Any]], run: str
) -> RunConfig:
    """The configuration with tasks more, or as it is where the run has just these to finish.

    Args:
        config: The run's.
        state: The run's state.
        tasks: Tasks, entries as `tasks` takes them (paths are of the working folder), or names of the benchmark's.
        run: The run's folder, as it is called.

    Raises:
        PmLlmError: If other tasks are unfinished, one is in the run already, boundaries are blurred, or every task is
            scored from the start.
    """
    names, entries = _named(config, tasks)
    finished, all_tasks = [stage.task for stage in state["stages"]], state["tasks"]
    folder = Path(config.data_dir) if config.data_dir else None
    # of a task that was begun, or taken back, the entry that is given now
    others = [one for one in config.tasks if not {task_name(s, folder) for s in user_tasks([one], folder)} & {*names}]
    if all_tasks[len(finished) :] == names:
        return dataclasses.replace(config, tasks=[*others, *entries])
    if len(all_tasks) > len(finished):
        raise PmLlmError(
            f"{run} has trained {len(finished)} of {len(all_tasks)} tasks; {all_tasks[len(finished)]!r} is "
            "unfinished. Add that again, or give the command that began it."
        )
    again = sorted(set(names) & set(all_tasks))
    if again or len(set(names)) < len(names):
        raise PmLlmError(
            f"task {(again or names)[0]!r} is in {run} already. Give the new one a name of its own: "
            "'{data: FILE, name: NAME}'."
        )
    if config.evaluate == "all" or config.fuar:
        raise PmLlmError(
            f"{run} scores every task from the start (evaluate: all), which a task that comes later was not. Add to "
            "runs that score the tasks seen so far."
        )
    if config.blur:
        raise PmLlmError("blur mixes rows of neighbouring tasks, and those of finished tasks are gone. Give --blur 0.")
    return dataclasses.replace(config, tasks=[*others, *entries], order=[*all_tasks, *names], repeat=1)


def _named(config: RunConfig, tasks: Sequence[Task | str | dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """The names of given tasks, and of those that are entries of the configuration these. Raises as :func:`added`."""
    if not tasks:
        raise PmLlmError("no task is given. Name a file, a folder, a dataset id, or a task of the run's benchmark.")
    names: list[str] = []
    entries: list[Any] = []
    listed = [] if config.benchmark is None else list(load_benchmark(config.benchmark).TASKS)
    for task in tasks:
        if isinstance(task, Task):
            names.append(task.name)
        elif isinstance(task, str) and task in listed:
            names.append(task)
        else:
            names += [task_name(spec, None) for spec in user_tasks([_absolute(task)], None)]
            entries.append(_absolute(task))
    return names, entries


def _absolute(task: str | dict[str, Any]) -> str | dict[str, Any]:
    """The same, with the paths of what is here in full: a run's own are relative to another folder."""
    if isinstance(task, str):
        return str(Path(task).absolute()) if Path(task).exists() or task.startswith(("/", ".")) else task
    keys = ("data", "test_data", "validation_data")
    return {key: _absolute(x) if key in keys and isinstance(x, str) else x for key, x in task.items()}
