"""Replay: rows of past tasks are kept and trained on again. For comparison with methods that keep none.

With answers of its own, the model of before the task answers the kept prompts, and what scores is trained on
(On-Policy Replay, arXiv 2605.29495, of which only the abstract is known here: 1 to 10 % of the prompts).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pm_llm.constraints.base import Constraint, Context
from pm_llm.errors import PmLlmError
from pm_llm.families.base import Row
from pm_llm.families.rows import joined
from pm_llm.system.options import option


@dataclass
class Replay(Constraint):
    """The rows of a task are trained on together with those kept of the tasks before.

    Args:
        share: Of each task's training rows that is kept (buffer `task`), at least one row.
        buffer: `task`: that share of each, which grows with the tasks. `reservoir`: as many rows as the share of the
            first task's, drawn evenly from all rows seen so far (Vitter's algorithm R), which does not grow.
        longer: Train on for as many steps more as there are rows more, where steps are given and not epochs.
        answers: To the kept prompts: those that were `given`, or the model's `own`, drawn anew for each task.
        at_least: What an answer of its own must score against the one that was given, from 0 to 100.
    """

    share: float = option(0.02, above=0, most=1)
    buffer: str = option("task", choices=("task", "reservoir"))
    longer: bool = False
    answers: str = option("given", choices=("given", "own"))
    at_least: float = option(50.0, least=0, most=100)
    kept: list[Row] = field(default_factory=list, init=False, repr=False)
    _of: list[int] = field(default_factory=list, init=False, repr=False)  # the task of each kept row
    _used: int = field(default=0, init=False, repr=False)  # of them, in the task that is trained
    _seen: int = field(default=0, init=False, repr=False)
    _room: int = field(default=0, init=False, repr=False)
    old_data = True
    stores = "rows of past tasks"

    def rows(self, rows: Sequence[Row], context: Context) -> Sequence[Row]:
        kept = self.kept
        if self.answers == "own" and kept:
            if context.answer is None:
                raise PmLlmError("replay with answers of its own needs a run (ContinualSequence), which can answer.")
            kept = [row for row in context.answer(kept, self._of, self.at_least) if row is not None]
        self._used = len(kept)
        return joined(rows, kept)

    def finish(self, context: Context) -> dict[str, float]:
        return {"replayed": float(self._used)} if self.answers == "own" else {}

    def steps(self, steps: int, context: Context) -> int:
        own = len(context.rows)
        return round(steps * (own + self._used) / own) if self.longer and steps > 0 else steps

    def remember(self, context: Context) -> None:
        rows, rng = context.rows, random.Random(f"replay {context.seed}")
        count = max(1, round(self.share * len(rows)))
        if self.buffer == "task":
            self.kept = self.kept + [rows[i] for i in rng.sample(range(len(rows)), count)]
            self._of = self._of + [context.task] * count
            return
        self._room = self._room or count
        for row in rows:
            self._seen += 1
            if len(self.kept) < self._room:
                self.kept, self._of = [*self.kept, row], [*self._of, context.task]
            elif (place := rng.randrange(self._seen)) < self._room:
                self.kept[place], self._of[place] = row, context.task

    def memory(self) -> dict[str, Tensor]:
        found = {"counts": torch.tensor([self._seen, self._room]), "tasks": torch.tensor(self._of)}
        for key in dict.fromkeys(key for row in self.kept for key in row):
            column = [row.get(key, []) for row in self.kept]  # rows of several kinds have other columns
            if isinstance(column[0], float):
                found[f"{key}.numbers"] = torch.tensor(column, dtype=torch.float64)
                continue
            found[f"{key}.lengths"] = torch.tensor([len(x) for x in column])
            found[f"{key}.values"] = torch.tensor([i for x in column for i in x])
        return found

    def load_memory(self, memory: dict[str, Tensor]) -> None:
        self._seen, self._room = memory["counts"].tolist()
        keys = [key.removesuffix(".lengths") for key in memory if key.endswith(".lengths")]
        columns: dict[str, list[Any]] = {
            k: [x.tolist() for x in memory[f"{k}.values"].split(memory[f"{k}.lengths"].tolist())] for k in keys
        }
        columns |= {k.removesuffix(".numbers"): x.tolist() for k, x in memory.items() if k.endswith(".numbers")}
        count = len(next(iter(columns.values()), ()))
        self.kept = [{key: x[i] for key, x in columns.items() if x[i] != []} for i in range(count)]
        self._of = memory["tasks"].tolist() if "tasks" in memory else [0] * count  # of runs of before: of no task
