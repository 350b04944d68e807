"""Merge rules against their formulas, written differently, and in their limit cases."""

from __future__ import annotations

import pytest
import torch

from pm_llm import Merger
from pm_llm.adapters import Adapter
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.lowrank import LowRank
from tests.invariants.test_closed_form import random_adapter


def folded(rule: str, count: int, continues: bool, **options) -> tuple[list[Adapter], list[Adapter], list[float]]:
    """The adapters that came, the running one after each, and the coefficients."""
    merger, running, came, left, used = Merger(rule, **options), None, [], [], []
    for t in range(count):
        came.append(random_adapter(t))
        running = merger.fold(running, came[-1], continues=continues)
        left.append(running)
        used.append(merger.report.coefficient)
    return came, left, used


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_exponential_is_the_weighted_mean_of_the_models(decay: float) -> None:
    came, left, _ = folded("exponential", 5, continues=True, decay=decay)
    for t in range(5):
        weights = torch.tensor([decay ** (t - i) if t > i or decay else 1.0 for i in range(t + 1)])
        for name, x in left[t].factors.items():
            models = torch.stack([came[i].factors[name].dense() for i in range(t + 1)])
            expected = (weights[:, None, None] * models).sum(0) / weights.sum()
            torch.testing.assert_close(x.dense(), expected if decay else models[-1], atol=1e-5, rtol=1e-4)


def test_exponential_near_one_is_the_average() -> None:
    _, slow, _ = folded("exponential", 4, continues=False, decay=1 - 1e-7)
    _, even, _ = folded("average", 4, continues=False)
    for name, x in slow[-1].factors.items():
        torch.testing.assert_close(x.dense(), even[-1].factors[name].dense(), atol=1e-4, rtol=1e-4)
    with pytest.raises(PmLlmError, match="below 1"):
        Merger("exponential", decay=1.0)


def test_slao_takes_the_new_a_and_moves_b_by_one_over_root_t() -> None:
    came, left, used = folded("slao", 4, continues=True)
    b = {name: x.B for name, x in came[0].factors.items()}
    for t in range(1, 4):
        for name, x in left[t].factors.items():
            share = (t + 1) ** -0.5
            b[name] = (1 - share) * b[name] + share * came[t].factors[name].B
            torch.testing.assert_close(x.B, b[name])
            assert torch.equal(x.A, came[t].factors[name].A)
    assert used == pytest.approx([1, 0.7071, 0.5774, 0.5], abs=1e-4)
    assert left[-1].rank == came[0].rank


def test_slao_needs_one_rank_and_an_adapter_that_continues() -> None:
    merger = Merger("slao")
    running = merger.fold(None, random_adapter(0), continues=True)
    with pytest.raises(PmLlmError, match="must continue"):
        merger.fold(running, random_adapter(1))
    wide = Adapter({n: LowRank(torch.randn(6, 3), torch.randn(3, 5)) for n in running.factors}, running.place)
    with pytest.raises(PmLlmError, match="one rank"):
        merger.fold(running, wide, continues=True)
    for keys in ({"method": "slao", "start": "fresh"}, {"method": "slao", "max_rank": 4}):
        with pytest.raises(PmLlmError, match=r"continues|max_rank is 4"):
            load_config(None, keys).check()
