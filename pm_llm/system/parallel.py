"""Work on independent modules, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


MOST = 8  # modules at once: each has its own intermediate matrices


def each(function: Callable[[str], Result], names: Iterable[str]) -> dict[str, Result]:
    """`function` of every name, in their order, on as many threads as torch may use; each call itself uses one.

    On matrices as thin as LoRA factors threads inside a call gain nothing, so a module has a thread to itself.
    """
    names, threads = list(names), torch.get_num_threads()
    if threads == 1:
        return {name: function(name) for name in names}
    pool = ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,))
    try:
        return dict(zip(names, pool.map(function, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
