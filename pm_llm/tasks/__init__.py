"""Tasks: rows of prompt and completion with splits and a scorer; benchmarks are ordered lists of them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pm_llm.errors import PmLlmError, unknown_name

if TYPE_CHECKING:
    from pm_llm.config import RunConfig

# benchmark name -> module with `load(order, data_dir) -> list[Task]` and ORDERS
BENCHMARKS = {
    "embedded": "pm_llm.tasks.embedded",
    "standard_cl": "pm_llm.tasks.standard_cl",
}


@dataclass(frozen=True)
class Example:
    """One row. The prompt is `head + body + tail`; only `body` may be shortened to fit, so the answer frame stays.

    Where head and tail are empty (the user's own prompts), the middle of the body is what goes.

    `messages` replaces the three for chat data: the turns before the answer, rendered by the chat template.
    """

    body: str
    completion: str
    head: str = ""
    tail: str = ""
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def prompt(self) -> str:
        """The whole prompt, before any shortening."""
        return self.head + self.body + self.tail


@dataclass(frozen=True)
class Task:
    """A named task. `labels` are the options of a classification task, in prompt order, if it is one."""

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    scorer: str = "exact_match"
    labels: tuple[str, ...] = ()

    def checked(self) -> Task:
        """This task. Raises PmLlmError if the scorer is unknown, a split has no rows or a completion is empty."""
        from pm_llm.evaluation.scorers import SCORERS

        if self.scorer not in SCORERS:
            raise unknown_name(f"scorer of task {self.name!r}:", self.scorer, SCORERS)
        for split, rows in (("train", self.train), ("test", self.test)):
            if not rows:
                raise PmLlmError(f"task {self.name!r} has no {split} rows. Check its file, split name and filters.")
            for number, row in enumerate(rows):
                if not row.completion.strip():
                    raise PmLlmError(
                        f"task {self.name!r}: the label of {split} row {number} is empty. "
                        "Every row needs an answer; drop or fill it."
                    )
        return self

    def subset(self, train: int | None, test: int | None, seed: int) -> Task:
        """At most `train` and `test` rows, drawn without replacement by `seed` and the task's name."""

        def draw(rows: Sequence[Example], n: int | None, split: str) -> Sequence[Example]:
            if n is None or n >= len(rows):
                return rows
            return random.Random(f"{seed} {self.name} {split}").sample(list(rows), n)

        return replace(self, train=draw(self.train, train, "train"), test=draw(self.test, test, "test"))


def load_tasks(config: RunConfig) -> list[Task]:
    """The tasks of a run, in order, checked and cut to `max_train_samples` and `max_test_samples`.

    Raises:
        PmLlmError: If neither or both of `benchmark` and `tasks` are given, a name is unknown, a name occurs twice,
            data is missing, or a task has no rows or an empty answer.
    """
    if (config.benchmark is None) == (not config.tasks):
        raise PmLlmError("give either `benchmark` (with `order`) or `tasks` (files or dataset ids), and not both.")
    if config.benchmark is not None:
        if config.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", config.benchmark, BENCHMARKS)
        tasks = importlib.import_module(BENCHMARKS[config.benchmark]).load(config.order, config.data_dir)
    else:
        from pm_llm.tasks.user import load_user_tasks

        tasks = load_user_tasks(config.tasks, Path(config.data_dir) if config.data_dir else None)
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise PmLlmError(f"two tasks have one name: {', '.join(names)}. Give each its own `name`.")
    return [task.checked().subset(config.max_train_samples, config.max_test_samples, config.seed) for task in tasks]


def pick_order(order: str | Sequence[str] | None, orders: dict[str, list[str]], known: Sequence[str]) -> list[str]:
    """The task names of a named order, or a list (or comma-separated string) of names themselves."""
    if order is None:
        return next(iter(orders.values()))
    if isinstance(order, str) and order in orders:
        return orders[order]
    names = order.split(",") if isinstance(order, str) else list(order)
    if isinstance(order, str) and len(names) == 1 and order not in known:
        raise unknown_name("order", order, [*orders, *known])
    for name in names:
        if name not in known:
            raise unknown_name("task in `order`", name, known)
    return names
