"""The sequence of tasks: a named order, a list of names, a random one; boundaries may be blurred."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.tasks.base import Example, Task, picked


def pick_order(order: str | Sequence[str] | None, orders: dict[str, list[str]], known: Sequence[str]) -> list[str]:
    """The task names of a named order (the first by default), or a list (or comma-separated string) of names.

    `random:SEED` shuffles the first order, `random:SEED:order6` that one. A name may occur several times.

    Raises:
        PmLlmError: If an order or a task is unknown, or the seed is no whole number.
    """
    if order is None:
        return next(iter(orders.values()))
    if isinstance(order, str) and order in orders:
        return orders[order]
    if isinstance(order, str) and order.partition(":")[0] == "random" and order not in known:
        return _shuffled(order, orders)
    if not isinstance(order, (str, list, tuple)) or not order or not all(isinstance(name, str) for name in order):
        raise PmLlmError(f"order is {order!r}; give an order's name, a list of task names, or random:SEED.")
    names = [name.strip() for name in order.split(",")] if isinstance(order, str) else list(order)
    if isinstance(order, str) and len(names) == 1 and order not in known:
        raise unknown_name("order", order, [*orders, "random:SEED", *known])
    for name in names:
        if name not in known:
            raise unknown_name("task in `order`", str(name), known)
    return names


def _shuffled(order: str, orders: dict[str, list[str]]) -> list[str]:
    _, _, rest = order.partition(":")
    seed, _, of = rest.partition(":")
    if not seed.isdecimal():
        raise PmLlmError(f"order is {order!r}; a random one is written random:SEED with a whole number, as random:1.")
    if of and of not in orders:
        raise unknown_name("order", of, orders)
    names = list(orders[of] if of else next(iter(orders.values())))
    random.Random(int(seed)).shuffle(names)
    return names


def retaining(tasks: Sequence[Task], kept: Sequence[Task], share: float, seed: int) -> list[Task]:
    """The tasks with rows of `kept` mixed into each one's training, so that they are `share` of it; in `foreign`.

    They are drawn anew for each task, none twice before all were drawn.

    Args:
        tasks: The tasks; of finished ones nothing is trained any more.
        kept: The tasks whose training rows are drawn.
        share: Of all rows that are trained on.
        seed: Of the draw.
    """
    places = [(task.name, i) for task in kept for i in range(len(task.train))]
    by_name = {task.name: task for task in kept}
    found = []
    for task in tasks:
        if task.kept is not None or not places:
            found.append(task)
            continue
        rng = random.Random(f"{seed} retain {task.name}")
        count = max(1, round(share / (1 - share) * len(task.train)))
        whole, rest = divmod(count, len(places))
        drawn: dict[str, list[Example]] = {}
        for name, i in [*places * whole, *rng.sample(places, rest)]:
            drawn.setdefault(name, []).append(by_name[name].train[i])
        found.append(replace(task, foreign=(*task.foreign, *drawn.items())))
    return found


def blurred(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """The tasks with `share` of each one's training rows replaced by rows of its neighbours in the sequence.

    Both neighbours give alike; the first and the last task have one, and a task is no neighbour of itself. The
    neighbours' rows are in `foreign`. Test rows stay as they are.
    """
    if share == 0 or len(tasks) < 2:
        return list(tasks)
    mixed = []
    for i, task in enumerate(tasks):
        rng = random.Random(f"{seed} blur {i}")
        beside = [tasks[j] for j in (i - 1, i + 1) if 0 <= j < len(tasks)]
        neighbours = [neighbour for neighbour in beside if neighbour.name != task.name]
        count = round(share * len(task.train))
        foreign: dict[str, list[Example]] = {}
        for k, neighbour in enumerate(neighbours):
            n = count // len(neighbours) + (k < count % len(neighbours))
            numbers = rng.sample(range(len(neighbour.train)), min(n, len(neighbour.train)))
            drawn = [neighbour.train[i] for i in numbers]
            foreign[neighbour.name] = foreign.get(neighbour.name, []) + drawn
        count = len(task.train) - sum(map(len, foreign.values()))
        kept = picked(task.train, rng.sample(range(len(task.train)), count))
        mixed.append(replace(task, train=kept, whole=task.train, foreign=tuple(foreign.items())))
    return mixed
