"""Low-rank algebra against dense matrices."""

from __future__ import annotations

import pytest
import torch

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank


def random(rank: int, out: int = 9, width: int = 7, seed: int = 0) -> LowRank:
    torch.manual_seed(seed)
    return LowRank(torch.randn(out, rank), torch.randn(rank, width))


def test_add_scale_inner() -> None:
    x, y = random(2), random(3, seed=1)
    torch.testing.assert_close(lowrank.add(x, y.scale(-0.3)).dense(), x.dense() - 0.3 * y.dense())
    assert lowrank.inner(x, y) == pytest.approx(float((x.dense() * y.dense()).sum()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 5, 6, 10])
def test_truncate_is_the_best_approximation(rank: int) -> None:
    x = random(6)
    kept, lost, total = lowrank.truncate(x, rank)
    s = torch.linalg.svdvals(x.dense().double())
    assert kept.rank == min(rank, 6)
    assert lost == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-5, abs=1e-9)
    assert total == pytest.approx(float((s**2).sum()), rel=1e-5)
    assert float((kept.dense() - x.dense()).norm() ** 2) == pytest.approx(lost, rel=1e-4, abs=1e-8)


def test_rank_above_both_sides_and_rank_deficient() -> None:
    wide = random(20)  # rank 20 for a 9 x 7 matrix
    kept, lost, _ = lowrank.truncate(wide, 7)
    torch.testing.assert_close(kept.dense(), wide.dense(), atol=1e-4, rtol=1e-4)
    assert lost < 1e-6
    double = lowrank.add(random(2), random(2).scale(2.0))  # rank 4 on paper, 2 in truth
    kept, lost, total = lowrank.truncate(double, 2)
    assert lost < 1e-9 * total
    torch.testing.assert_close(kept.dense(), 3 * random(2).dense(), atol=1e-4, rtol=1e-4)


def test_zero_and_bad_input() -> None:
    zero = LowRank(torch.zeros(9, 3), torch.zeros(3, 7))
    kept, lost, total = lowrank.truncate(zero, 2)
    assert (lost, total) == (0.0, 0.0)
    assert not kept.dense().any()
    with pytest.raises(ValueError, match="factors"):
        LowRank(torch.zeros(9, 3), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="shapes"):
        lowrank.add(random(2), random(2, out=8))
    with pytest.raises(ValueError, match="at least 1"):
        lowrank.truncate(random(2), 0)
