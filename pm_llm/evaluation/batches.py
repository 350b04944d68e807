"""Batches of rows of like length within a budget of tokens, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from accelerate.utils import gather_object

from pm_llm.system.processes import process_state
from pm_llm.system.sharing_out import in_step

OVERHEAD = 100  # what a batch costs besides its tokens, in tokens: the weights are read once for all its rows


def pack(lengths: Sequence[int], extra: int, rows: int, tokens: int, one_length: bool = False) -> list[list[int]]:
    """Row numbers in batches, longest first, that cost least: the sum of rows x longest + OVERHEAD over the batches.

    Args:
        lengths: Each row's length in tokens.
        extra: What a row may grow by, in tokens.
        rows: Largest number of rows in a batch.
        tokens: Largest number of rows x (longest length + extra); a longer row is a batch of its own.
        one_length: Whether all rows of a batch must be of one length: nothing is padded.
    """
    # longest first: running out of memory shows at once
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    least, begins = [0.0], [0]  # for the first n rows: their least cost, and where its last batch begins
    for end in range(1, len(order) + 1):
        best, begin = float("inf"), end - 1
        for start in range(end - 1, max(-1, end - 1 - rows), -1):
            longest, count = lengths[order[start]], end - start
            if count > 1 and count * (longest + extra) > tokens:
                break
            if one_length and longest != lengths[order[end - 1]]:
                break
            cost = least[start] + count * longest + OVERHEAD
            if cost < best:
                best, begin = cost, start
        least.append(best)
        begins.append(begin)
    batches, end = [], len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def in_batches(
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Any]],
    progress: Callable[[int], Any] | None = None,
    model: Any = None,
) -> list[Any]:
    """`work` on every batch, each by one process; every process gets all results, in the rows' order.

    `model` is what works, where it may be shared out over the processes; None: it is not.

    Raises:
        RuntimeError: If a row came back twice or not at all.
    """
    state = process_state()
    mine: list[tuple[int, Any]] = []
    with nullcontext() if model is None else in_step(model):
        for batch in batches[state.process_index :: state.num_processes]:
            mine += zip(batch, work(batch), strict=True)
            if progress is not None:
                progress(len(batch))
    pairs = gather_object(mine)
    found, rows = dict(pairs), sum(map(len, batches))
    if len(pairs) != rows or found.keys() != set(range(rows)):
        raise RuntimeError(f"{len(pairs)} answers came back for {rows} rows; each row must be answered once.")
    return [found[i] for i in range(rows)]
