"""Taking back: the merged adapter without one task's part, and an earlier stage as the current one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.methods import Method
from pm_llm.run.folder import RunDir
from pm_llm.run.kept import read_all
from pm_llm.run.reading import TASK_ADAPTER
from pm_llm.run.record import StageRecord
from pm_llm.system.files import new_folder


@dataclass(frozen=True)
class Removed:
    """`own_error` is how far the run's adapter is from the sum of its parts (what truncation cut), `error` how far the
    written one is from the sum of the others; both relative, in the Frobenius norm over all modules."""

    rank: int
    own_error: float
    error: float


def remove(run_dir: RunDir, task: str, out: str | Path, dtype: str | None = None) -> Removed:
    """Write the run's adapter without a task's part as the folder `out`.

    A merge `M_t = M_{t-1} + alpha_t Delta_t` is the sum `M_0 + sum_t alpha_t Delta_t` (M_0: what the run began with),
    of which the task's terms are left out. That is exact as far as no rank is cut; it is cut to the run's `max_rank`
    where it is larger. What later tasks learned on top of the task stays.

    Args:
        run_dir: The run.
        task: The task's name.
        out: The folder; must not exist.
        dtype: Of the weights written; by default float32.

    Raises:
        PmLlmError: If there is no such task, it is the only one, or the merge is no such sum.
    """
    state = run_dir.state()
    stages: list[StageRecord] = state["stages"]
    names = [stage.task for stage in stages]
    if task not in names:
        raise PmLlmError(f"{run_dir.path} has finished no task {task!r}. It has: {', '.join(names) or 'none yet'}.")
    if set(names) == {task} and state["origin"] is None:
        raise PmLlmError(f"{task!r} is the only task of {run_dir.path}: without it there is the base model alone.")
    for stage in stages:
        _check_sum(stage)
    run_dir.check([f"stages/{stage.folder}/{TASK_ADAPTER}/" for stage in stages] + ["origin/"])
    begun = [Adapter.load(run_dir.origin)] if state["origin"] else []
    parts = [Adapter.load(run_dir.stage_adapter(i, TASK_ADAPTER)) for i in range(len(stages))]
    running, found = Adapter.load(run_dir.adapter), {}
    squares = {"own": 0.0, "all": 0.0, "cut": 0.0, "left": 0.0}
    limit = state["config"]["max_rank"]
    for name in running.factors:
        weighted = [x.factors[name].scale(s.coefficients[name]) for x, s in zip(parts, stages, strict=True)]
        first = [x.factors[name] for x in begun]
        whole = lowrank.add(*first, *weighted)
        left = lowrank.add(*first, *(x for x, s in zip(weighted, stages, strict=True) if s.task != task), _none(whole))
        gap = lowrank.add(whole, running.factors[name].scale(-1.0))
        squares["own"] += max(0.0, lowrank.inner(gap, gap))
        squares["all"] += lowrank.inner(whole, whole)
        full = min(left.shape) if limit is None else min(limit, *left.shape)
        kept, lost, total = lowrank.truncate(left, full)
        squares["cut"], squares["left"] = squares["cut"] + lost, squares["left"] + total
        found[name] = lowrank.trimmed(kept)
    made = running.replace_factors(found)
    with new_folder(out) as scratch:
        made.save(scratch, dtype)
    own, cut = (sqrt(squares[a] / squares[b]) if squares[b] > 0 else 0.0 for a, b in (("own", "all"), ("cut", "left")))
    return Removed(made.rank, own, cut)


def _none(like: LowRank) -> LowRank:
    """Zero, of rank 1."""
    return LowRank(torch.zeros_like(like.B[:, :1]), torch.zeros_like(like.A[:1]))


def _check_sum(stage: StageRecord) -> None:
    """Raise PmLlmError unless a stage's merge added a part of its own."""
    words: Mapping[str, Any] = stage.words
    method = Method().replaced(words["start"], words["constrain"], words["merge"])
    start, merge = method.start.build("start"), method.merge.build("merge")
    if not merge.is_sum or start.stands_on != "running":
        raise PmLlmError(
            f"task {stage.task!r} was merged by {method.merge.name} from start {method.start.name}, which is no sum "
            "of the tasks' adapters with coefficients: no part of it is one task's. Use restore, or train again "
            "without the task."
        )


def restore(run_dir: RunDir, to: str | int) -> list[str]:
    """Make the stage of task `to` the run's current one, back or forth; returns the tasks that are taken back now.

    `to` is a name or a number; an int is a number whatever tasks are called. What comes after it stays in the folder
    until another task is committed.

    Raises:
        PmLlmError: If no stage that is there is of that name or number, or it is the current one.
    """
    state = run_dir.state()
    names = [stage.task for stage in (*state["stages"], *state["undone"])]
    numbers = [i for i, name in enumerate(names, start=1) if to == i or to in (name, str(i))]
    if len(numbers) != 1:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1)) or "none yet"
        found = f"comes {len(numbers)} times" if numbers else "is no finished task of this run"
        raise PmLlmError(f"--to {to!r} {found}. Give a task by name or number: {shown}.")
    if numbers[0] == len(state["stages"]) == len(state["tasks"]):
        raise PmLlmError(f"task {to!r} is the current stage of {run_dir.path} already.")
    if state["config"]["fuar"]:
        raise PmLlmError(
            f"{run_dir.path} computes FUAR, which names a task for each of its states. It cannot lose one."
        )
    stages = [*state["stages"], *state["undone"]]
    tasks = read_all(run_dir, stages[: numbers[0]])
    probes = {n: x for n, x in state["rows"]["test"].items() if n not in {*names, *state["tasks"]}}
    test = {task.name: task.kept.test for task in tasks if task.kept}
    rows = {"train": [task.kept.train for task in tasks if task.kept], "test": {**test, **probes}}
    run_dir.restore(numbers[0], rows)
    return names[numbers[0] :]
