"""`pm-llm tune`: a learning rate, and the weight of a penalty, found on validation rows of the first tasks."""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pm_llm.commands.keys import add_keys, config_of
from pm_llm.errors import PmLlmError

if TYPE_CHECKING:
    from pm_llm.config import RunConfig
    from pm_llm.tasks.base import Task

SHARES = (0.25, 0.5, 1.0)  # of the steps, in each round
UNITS = {"s": 1, "m": 60, "h": 3600}


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "tune",
        help="find a learning rate on validation rows of the first tasks",
        description="Short runs of the first tasks, scored on validation rows (every tenth training row, where a task "
        "has none): all candidates with a quarter of the steps, the better half of them with half, the better half of "
        "those with all (successive halving, arXiv 1502.07943). Further flags are keys of the configuration.",
    )
    add_keys(parser)
    parser.add_argument(
        "--rates",
        type=int,
        default=3,
        metavar="N",
        help="how many learning rates, a factor of two apart, around the configuration's (3)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="weights of the curvature penalty to try with each (pm_curvature; default: its own)",
    )
    parser.add_argument("--first", type=int, default=2, metavar="N", help="how many tasks (2)")
    parser.add_argument("--budget", default="20m", help="time after which no further run begins: 90s, 20m, 2h (20m)")
    parser.set_defaults(call=call)


@dataclass
class Candidate:
    """Settings, and what they scored by share of the steps."""

    rate: float
    weight: float | None
    scores: dict[float, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For a line."""
        return f"{self.rate:.2g}" + ("" if self.weight is None else f", weight {self.weight:g}")


def call(given: argparse.Namespace) -> int:
    """`pm-llm tune`: rounds of short runs, a table, and the values to take."""
    end = time.monotonic() + seconds(given.budget)
    if given.rates < 1 or given.first < 1:
        raise PmLlmError("--rates and --first must be at least 1.")
    config = config_of(given)
    from pm_llm.report.terminal import aligned

    candidates = [Candidate(rate, weight) for rate in rates(config, given.rates) for weight in given.weights or [None]]
    config, tasks, lower = prepared(config, given.first)
    print(
        f"{len(candidates)} candidates on {', '.join(task.name for task in tasks)}, scored on validation rows",
        flush=True,
    )
    halve(candidates, config, tasks, lower, end)
    last = max(share for one in candidates for share in one.scores)
    best = sorted((one for one in candidates if last in one.scores), key=lambda c: c.scores[last], reverse=not lower)[
        0
    ]
    head = ["learning rate", *(f"{share:.0%} of steps" for share in SHARES)]
    rows = [[one.name, *(f"{one.scores[s]:.1f}" if s in one.scores else "" for s in SHARES)] for one in candidates]
    print()
    for line in aligned([[(cell, "") for cell in row] for row in (head, *rows)], whole=True):
        print("".join(text for text, _ in line).rstrip())
    print(f"\ntake --train.learning_rate {best.rate:g}", end="")
    print("" if best.weight is None else f" --constrain '{{name: curvature, weight: {best.weight:g}}}'")
    return 0


def seconds(text: str) -> float:
    """`20m` as seconds. Raises PmLlmError if it is no time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise PmLlmError(f"--budget is {text!r}; it must be a number with s, m or h, as in 20m.")
    return float(found[1]) * UNITS[found[2]]


def rates(config: RunConfig, number: int) -> list[float]:
    """So many rates, each twice the one before, the configuration's in the middle."""
    return [config.train.learning_rate * 2.0 ** (i - (number - 1) // 2) for i in range(number)]


def prepared(config: RunConfig, first: int) -> tuple[RunConfig, list[Task], bool]:
    """The configuration of the short runs, their tasks with validation rows in place of the test rows, and whether a
    lower score is better. Raises PmLlmError if it is for some tasks alone."""
    from pm_llm.config import configured
    from pm_llm.evaluation.matrix import lower_of
    from pm_llm.tasks.loading import load_tasks

    config = configured(config.plain(), {"evaluate": "final", "probes": []}, "the configuration")
    config.general, config.gate = type(config.general)(), type(config.gate)()  # neither scored nor looked at here
    tasks = [_on_validation(task) for task in load_tasks(config)[:first]]
    lower = lower_of([task.name for task in tasks], [task.scorer for task in tasks])
    if lower and len(lower) < len(tasks):
        raise PmLlmError(
            "some of these tasks are better with a lower score, some with a higher. Tune on one: --first 1."
        )
    return config, tasks, bool(lower)


def _on_validation(task: Task) -> Task:
    """Scored on its validation rows, or on every tenth training row, which is then not trained on."""
    from pm_llm.tasks.base import picked

    if task.validation:
        return replace(task, test=task.validation)
    every = range(len(task.train))
    train, test = (picked(task.train, [i for i in every if (i % 10 == 9) is held]) for held in (False, True))
    if not len(test):
        raise PmLlmError(f"task {task.name!r} has {len(task.train)} training rows; tuning needs ten, to score one.")
    return replace(task, train=train, test=test)


def halve(candidates: list[Candidate], config: RunConfig, tasks: list[Task], lower: bool, end: float) -> None:
    """Score them in rounds, as long as there is time; the first round is always finished for one candidate."""
    left = candidates
    for share in SHARES:
        for one in left:
            if time.monotonic() > end and any(c.scores for c in candidates):
                print("the time is over", flush=True)
                return
            one.scores[share] = score(one, config, tasks, share)
            print(f"  {one.name}: {one.scores[share]:.1f} with {share:.0%} of the steps", flush=True)
        left = sorted(left, key=lambda c: c.scores[share], reverse=not lower)[: math.ceil(len(left) / 2)]


def score(one: Candidate, config: RunConfig, tasks: list[Task], share: float) -> float:
    """The average on the tasks' validation rows after a run with so much of the steps."""
    from pm_llm.config import configured
    from pm_llm.sequence import ContinualSequence
    from pm_llm.system.quiet import silence

    train = config.train
    steps: dict[str, Any] = (
        {"train.max_steps": max(1, round(train.max_steps * share))}
        if train.max_steps > 0
        else {"train.num_train_epochs": train.num_train_epochs * share}
    )
    keys: dict[str, Any] = {"train.learning_rate": one.rate, **steps}
    if one.weight is not None:
        keys["constrain"] = {"name": "curvature", "weight": one.weight}
    with tempfile.TemporaryDirectory(prefix="pm_llm.tune.") as folder, silence():
        keys["output_dir"] = str(Path(folder) / "run")
        results = ContinualSequence(configured(config.plain(), keys, "tune"), tasks=list(tasks)).run()
    return float(results["average_accuracy"])
