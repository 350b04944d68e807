"""The sequence of tasks: a named order, a list of names, a random one; boundaries may be blurred."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.tasks import Task


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
    if isinstance(order, str) and order.startswith("random"):
        return _shuffled(order, orders)
    names = order.split(",") if isinstance(order, str) else list(order)
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


def blurred(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """The tasks with `share` of each one's training rows replaced by rows of its neighbours in the sequence.

    Both neighbours give alike; the first and the last task have one. Test rows stay as they are.
    """
    if share == 0 or len(tasks) < 2:
        return list(tasks)
    mixed = []
    for i, task in enumerate(tasks):
        rng = random.Random(f"{seed} blur {i}")
        neighbours = [tasks[j] for j in (i - 1, i + 1) if 0 <= j < len(tasks)]
        count = round(share * len(task.train))
        foreign = []
        for k, neighbour in enumerate(neighbours):
            n = count // len(neighbours) + (k < count % len(neighbours))
            foreign += rng.sample(list(neighbour.train), min(n, len(neighbour.train)))
        rows = [*rng.sample(list(task.train), len(task.train) - len(foreign)), *foreign]
        rng.shuffle(rows)
        mixed.append(replace(task, train=rows))
    return mixed
