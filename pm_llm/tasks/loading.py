"""Tasks from a configuration: benchmarks, files, datasets of the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.tasks.base import Task, check_while, distinct
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


def load_tasks(config: RunConfig, kept: Sequence[Task] = ()) -> list[Task]:
    """The tasks of a run, in the order they are trained, checked and cut to `max_train_samples`, `max_test_samples`.

    With `repeat` a task occurs several times. With `evaluation.split: validation` the `test` rows are the validation
    rows.

    Args:
        config: The run's.
        kept: The tasks that the run has finished, from the first on: they are taken as they are, and their files are
            not opened unless they come again.

    Raises:
        PmLlmError: If neither or both of `benchmark` and `tasks` are given, a name is unknown or occurs twice, or with
            everything that is wrong with files and rows, each with file and line.
    """
    from pm_llm.tasks.order import blurred

    problems = Problems(drop=config.bad_rows == "drop")
    names, load = _named(config, kept)
    finished = {task.name: task for task in kept}
    needed = dict.fromkeys([*names[len(kept) :], *(name for name in names if name not in finished)])
    tasks = {name: load(name, problems) for name in needed}
    if config.evaluation.split == "validation":
        tasks = {name: _on_validation(task, problems) for name, task in tasks.items()}
    problems.tell()
    cut = finished | {
        name: task.subset(config.max_train_samples, config.max_test_samples, config.seed)
        for name, task in tasks.items()
    }
    return blurred([cut[name] for name in names], config.blur, config.seed)


def _named(config: RunConfig, kept: Sequence[Task]) -> tuple[list[str], Callable[[str, Problems], Task]]:
    """The names of a run's tasks, a stage each, and what reads one of them. Raises as :func:`load_tasks`."""
    from pm_llm.tasks.order import pick_order
    from pm_llm.tasks.user import load_user_task, task_name, user_tasks

    if config.benchmark is None and not config.tasks and not kept:
        raise PmLlmError(
            "give `benchmark` (with `order`), or `tasks` (files or dataset ids), or both; or a file "
            "that does, with --config (pm-llm init writes one)."
        )
    folder, benchmark = Path(config.data_dir) if config.data_dir else None, config.benchmark
    specs = user_tasks(config.tasks, folder, kept)
    own = [task_name(spec, folder) for spec in specs]
    module = None if benchmark is None else load_benchmark(benchmark)
    listed = [] if module is None else list(module.TASKS)
    if len({*own, *listed}) < len(own) + len(listed):
        raise PmLlmError(f"two tasks have one name: {', '.join(own)}. Give each its own `name`.")
    known = list(dict.fromkeys([*listed, *own, *(task.name for task in kept)]))
    names = pick_order(config.order, {"as given": known} if module is None else module.ORDERS, known) * config.repeat
    if module is not None and not isinstance(config.order, list):
        names = names + own  # a list says all by itself
    by_name = dict(zip(own, specs, strict=True))
    for task in kept:
        spec = by_name.get(task.name)
        if spec is not None and (spec.scorer or task.scorer, tuple(spec.labels)) != (task.scorer, task.labels):
            raise PmLlmError(
                f"task {task.name!r} is finished, and its scorer or labels are not what they were. Leave its entry as "
                "it was, or give the rows as a probe."
            )

    def load(name: str, problems: Problems) -> Task:
        if name in by_name:
            return load_user_task(by_name[name], folder, problems)
        assert module is not None
        return check_while(problems, partial(module.load_task, name, config.data_dir))

    return names, load


def load_probes(config: RunConfig) -> list[Task]:
    """The tasks that are scored and never trained, general abilities last. Raises as :func:`load_tasks` does."""
    from pm_llm.tasks.general import general_tasks

    tasks = _all_rows(config, config.probes) + general_tasks(config.general.skills or ())
    tasks = [task.subset(None, config.max_test_samples, config.seed) for task in tasks]
    if not config.general.lm_eval:
        return tasks
    from pm_llm.evaluation.harness import harness_tasks

    return [*tasks, *harness_tasks(config.general)]


def tasks_or_none(config: RunConfig) -> list[Task]:
    """As :func:`load_tasks`; none where a configuration names probes or general abilities, and no task."""
    probes = config.probes or config.general.skills or config.general.lm_eval
    return [] if probes and config.benchmark is None and not config.tasks else load_tasks(config)


def load_retained(config: RunConfig) -> list[Task]:
    """The tasks whose rows are mixed into every task's training. Raises as :func:`load_tasks`."""
    given = config.retain.data
    entries = given if isinstance(given, list) else [] if given is None else [given]
    return [replace(task, name=f"retain.{task.name}", test=[]) for task in _all_rows(config, entries)]


def _all_rows(config: RunConfig, entries: Sequence[Any]) -> list[Task]:
    """The user's tasks that `entries` name, all rows of a file as training and as test rows."""
    from pm_llm.tasks.user import load_user_tasks

    problems = Problems(drop=config.bad_rows == "drop")
    tasks = load_user_tasks(entries, Path(config.data_dir) if config.data_dir else None, problems, probe=True)
    problems.tell()
    return tasks


def scored(config: RunConfig, tasks: Sequence[Task]) -> dict[str, Task]:
    """Name -> task of all that a run of `tasks` scores: these, and the probes after them.

    Raises:
        PmLlmError: If a name is taken twice, their scores cannot be averaged, or as :func:`load_tasks` does.
    """
    trained, probes = distinct(tasks), load_probes(config)
    found = trained | {task.name: task for task in probes}
    if len(found) < len(trained) + len(probes):
        raise PmLlmError("a probe has the name of a task or of another probe. Give each its own `name`.")
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
