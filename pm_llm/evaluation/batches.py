"""Batches of rows of like length within a budget of tokens, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object

from pm_llm.processes import process_state

PADDING = 0.2  # a row joins a batch if padding makes up at most this share of it


def pack(lengths: Sequence[int], extra: int, rows: int, tokens: int) -> list[list[int]]:
    """Row numbers in batches of like length: longest first, at most `rows` in one and at most `tokens` with padding.

    Args:
        lengths: Each row's length in tokens.
        extra: What a row may grow by, in tokens.
        rows: Largest number of rows in a batch.
        tokens: Largest number of rows x (longest length + extra); a longer row is a batch of its own.
    """
    batches: list[list[int]] = []
    # longest first: running out of memory shows at once
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        last = batches[-1] if batches else []
        longest = lengths[last[0]] if last else 0
        fits = len(last) < rows and (len(last) + 1) * (longest + extra) <= tokens
        if last and fits and lengths[i] >= (1 - PADDING) * longest:
            last.append(i)
        else:
            batches.append([i])
    return batches


def in_batches(
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Any]],
    progress: Callable[[int], Any] | None = None,
) -> list[Any]:
    """`work` on every batch, each by one process; every process gets all results, in the rows' order.

    Raises:
        RuntimeError: If a row came back twice or not at all.
    """
    state = process_state()
    mine: list[tuple[int, Any]] = []
    for batch in batches[state.process_index :: state.num_processes]:
        mine += zip(batch, work(batch), strict=True)
        if progress is not None:
            progress(len(batch))
    pairs = gather_object(mine)
    found, rows = dict(pairs), sum(map(len, batches))
    if len(pairs) != rows or found.keys() != set(range(rows)):
        raise RuntimeError(f"{len(pairs)} answers came back for {rows} rows; each row must be answered once.")
    return [found[i] for i in range(rows)]
