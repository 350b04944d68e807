"""The perturbation's signs and its running estimate of the curvature."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pm_llm import Perturb
from pm_llm.constraints.base import Step
from pm_llm.errors import PmLlmError


def test_signs_are_a_function_of_seed_and_step() -> None:
    a, b = Perturb(), Perturb()
    signs = [a.sign(Step(3, i)) for i in range(200)]
    assert signs == [b.sign(Step(3, i)) for i in range(200)]
    assert signs[50:] == [Perturb().sign(Step(3, i)) for i in range(50, 200)]  # as after a resume
    assert signs != [a.sign(Step(4, i)) for i in range(200)]


@pytest.mark.parametrize("p", [1 / 3, 0.1, 0.5, 0.0])
def test_frequencies(p: float) -> None:
    n = 20000
    counts = Counter(Perturb(probability=p).sign(Step(0, i)) for i in range(n))
    for sign, expected in ((-1, p), (0, 1 - 2 * p), (1, p)):
        assert abs(counts[sign] / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-9


def test_one_sign_a_step_by_default() -> None:
    for step in range(50):
        signs = {Perturb().sign(Step(0, step, m, 4, r, 3)) for m in range(4) for r in range(3)}
        assert len(signs) == 1


@pytest.mark.parametrize("options", [{"per_rank": True}, {"per_micro_step": True}])
def test_stratified_signs_are_balanced_in_every_step(options: dict) -> None:
    for step in range(100):
        places = [
            Step(0, step, rank=r, world_size=6) if "per_rank" in options else Step(0, step, r, 6) for r in range(6)
        ]
        assert Counter(Perturb(**options).sign(at) for at in places) == {-1: 2, 0: 2, 1: 2}
    first = Counter(Perturb(**options).sign(Step(0, s, 0, 6, 0, 6)) for s in range(6000))
    assert all(abs(count / 6000 - 1 / 3) < 0.03 for count in first.values())  # each place alone is unbiased


def test_curvature_of_a_quadratic() -> None:
    """On L(c) = 3 + 2 (c - 1) + 5/2 (c - 1)^2, with Delta' H Delta = 5, the estimate is exact."""
    perturb = Perturb(epsilon=0.5)
    for i in range(300):
        step = Step(0, i)
        c = perturb.scale(step)
        perturb.observe(step, torch.tensor(3 + 2 * (c - 1) + 2.5 * (c - 1) ** 2))
    assert perturb.logs(perturb.state_dict())["curvature"] == pytest.approx(5.0, rel=1e-3)


def test_no_curvature_before_all_signs_were_seen() -> None:
    perturb = Perturb()
    assert perturb.logs(perturb.state_dict()) == {}


@pytest.mark.parametrize("options", [{"epsilon": -0.1}, {"probability": 0.6}, {"epsilon": "half"}, {"decay": 1.0}])
def test_out_of_range(options: dict) -> None:
    with pytest.raises(PmLlmError, match=next(iter(options))):
        Perturb(**options)
