"""Runs that are stopped at a place of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pm_llm.session import Session
from pm_llm.stage import Stage


@contextmanager
def stopping(where: str, number: int, after: bool = False) -> Iterator[None]:
    """Within the block, stage `number` (from 1) ends in a KeyboardInterrupt: before (or after) `run`, `train`,
    `measure` or `evaluate`."""
    owner: Any = Session if where == "evaluate" else Stage
    original = getattr(owner, where)

    def interrupted(self: Any, *given: Any) -> Any:
        here = (given[0] + 1 if where == "evaluate" else self.number) == number
        if here and not after:
            raise KeyboardInterrupt
        found = original(self, *given)
        if here:
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        yield
