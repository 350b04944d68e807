"""The bounded sum of the past against the whole one: what it keeps of each task, along and around its own vector."""

from __future__ import annotations

import pytest
import torch

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Fisher, Room, form_of, past_of
from pm_llm.fisher.kronecker import Kronecker
from pm_llm.fisher.row_column import Factored
from pm_llm.fisher.scale import scale_of

D = 40
SIZES = [2, 20, 20, 20, 20, 1, 20, 20, 20, 20, 20, 20, 20]


def unlike(form: str, k: int, size: float):
    """A task that sees three outputs and three inputs of its own, with its vector along them, and Delta' F Delta."""
    generator = torch.Generator().manual_seed(0)
    Q, P = (torch.linalg.qr(torch.randn(D, D, generator=generator))[0] for _ in range(2))
    if form == "factored":  # a diagonal knows axes only
        Q, P = torch.eye(D), torch.eye(D)
    q, p = Q[:, 3 * k : 3 * k + 3], P[:, 3 * k : 3 * k + 3]
    generator.manual_seed(k)
    vector = LowRank(q @ torch.randn(3, 2, generator=generator), torch.randn(2, 3, generator=generator) @ p.T)
    fisher = Kronecker(q @ q.T, p @ p.T) if form == "kronecker" else Factored(q.square().sum(1), p.square().sum(1))
    return fisher.divided(fisher.inner(vector, vector) / size), vector


def folded(form: str, tasks, room: Room):
    """The sum over tasks that are added up one after the other, and the model at the end."""
    past, merged = None, None
    for fisher, vector in tasks:
        before, merged = merged, vector if merged is None else lowrank.add(merged, vector)
        past = form_of(form).past.plus(past, fisher, merged, room, merged, before)
    return past, merged


@pytest.mark.parametrize("form", ["kronecker", "factored"])
def test_thirteen_unlike_tasks_keep_their_own_curvature(form: str) -> None:
    tasks = [unlike(form, k, size) for k, size in enumerate(SIZES)]
    past, merged = folded(form, tasks, Room())
    generator = torch.Generator().manual_seed(1)
    anywhere = [
        LowRank(torch.randn(D, 2, generator=generator), torch.randn(2, D, generator=generator)) for _ in "1234"
    ]
    for vector in [vector for _, vector in tasks] + [merged, *anywhere]:
        exact = sum(fisher.inner(vector, vector) for fisher, _ in tasks)
        assert 0.8 * exact < past.along(vector) < 1.5 * exact
    kept, exact = past.kept_along()
    assert kept == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("form", ["kronecker", "factored"])
def test_a_joined_task_keeps_half_of_its_own_curvature_however_small_it_is(form: str) -> None:
    for small in (1.0, 1e-3, 1e-6):
        tasks = [unlike(form, 0, small), unlike(form, 1, 20.0)]
        past, _ = folded(form, tasks, Room(pairs=1))
        for fisher, vector in tasks:
            assert 0.49 < past.along(vector) / fisher.inner(vector, vector) < 1.01
        kept, exact = past.kept_along()  # of the one that lost more
        assert kept[0] / exact[0] == pytest.approx(min(past.along(v) / f.inner(v, v) for f, v in tasks), rel=1e-3)


@pytest.mark.parametrize("form", ["kronecker", "factored"])
def test_like_tasks_are_joined_first_and_exactly(form: str) -> None:
    tasks = [unlike(form, k % 3, 10.0 ** (k // 3)) for k in range(9)]
    past, _ = folded(form, tasks, Room(pairs=3))
    assert past.terms.count() == 3
    for _, vector in tasks:
        assert past.along(vector) == pytest.approx(sum(f.inner(vector, vector) for f, _ in tasks), rel=1e-3)


@pytest.mark.parametrize("form", ["kronecker", "factored"])
def test_the_slope_follows_the_model_and_joining_leaves_it(form: str) -> None:
    """Of merged models that are no task's optimum; with all terms it is exact in any number of tasks."""
    tasks = [unlike(form, k % 6, 1.0 + k) for k in range(8)]
    generator = torch.Generator().manual_seed(2)
    where = [LowRank(torch.randn(D, 3, generator=generator), torch.randn(3, D, generator=generator)) for _ in tasks]
    found = {}
    for pairs in (4, 32):
        past, before = None, None
        for (fisher, vector), at in zip(tasks, where, strict=True):
            past = form_of(form).past.plus(past, fisher, vector, Room(pairs=pairs, rank=40), at, before)
            before = at
        found[pairs] = past_of({name: x.clone() for name, x in past.tensors().items()})
    direction = LowRank(torch.randn(D, 2, generator=generator), torch.randn(2, D, generator=generator))
    exact = sum(
        fisher.inner(lowrank.add(vector, where[-1].scale(-1.0)), direction) for fisher, vector in tasks
    )  # <F o (theta - M), direction>
    assert found[32].pull(where[-1], direction) == pytest.approx(exact, rel=1e-3)
    joined = found[4].pull(where[-1], direction)
    assert joined != pytest.approx(exact, rel=1e-3)  # what was joined is another quadratic where the model went
    assert found[4].terms.count() == 4


def test_most_of_a_hundred_tasks_is_kept_in_bounded_room() -> None:
    tasks = [unlike("kronecker", k % 13, 1.0 + k % 5) for k in range(100)]
    past, _ = folded("kronecker", tasks, Room(pairs=16))
    assert past.terms.count() == 16
    sizes = {name: x.shape for name, x in past.tensors().items()}
    more, _ = folded("kronecker", tasks[:40], Room(pairs=16))
    assert sizes == {name: x.shape for name, x in more.tensors().items()}
    for _, vector in tasks[:13]:
        exact = sum(fisher.inner(vector, vector) for fisher, _ in tasks)
        assert 0.8 * exact < past.along(vector) < 1.5 * exact


def test_the_measured_scale_is_that_of_the_parabola_whether_training_ended_or_only_began() -> None:
    """L(alpha) = b/2 (alpha - 1.5)^2 is measured at 0 and at the end of the vector, which stops short of the
    minimum."""
    bend, least = 3.0, 1.5
    losses = tuple(1 + bend / 2 * (alpha - least) ** 2 for alpha in (0.0, 1.0))
    fisher, vector = unlike("kronecker", 0, 20.0)
    found = Fisher({"m": fisher}, losses=losses, slopes={"m": bend * (1 - least)})
    assert fisher.divided(scale_of(found, "measured", 20.0)).inner(vector, vector) == pytest.approx(bend, rel=1e-5)
    # one step of a long way down: what it took is slope, not curvature
    begun = Fisher({"m": fisher}, losses=(5.0, 3.85), slopes={"m": -1.14})
    assert fisher.divided(scale_of(begun, "measured", 20.0)).inner(vector, vector) == pytest.approx(0.1, rel=1e-4)
    for nothing in (Fisher({"m": fisher}, losses=(0.0, 0.0)), Fisher({"m": fisher.divided(1e9)}, losses=(0.0, 0.1))):
        assert scale_of(nothing, "measured", 20.0) == 1.0


def test_a_task_without_loss_goes_through_a_sequence_and_a_held_back_one_is_not_taken_back() -> None:
    (first, a), (second, b) = unlike("kronecker", 0, 4.0), unlike("kronecker", 0, 1.0)
    adapters = [Adapter({"m": one}, {"target_modules": ["m"]}) for one in (a, b)]
    merger = Merger("optimal", fisher_scale="measured")
    running = merger.fold(None, adapters[0], Fisher({"m": first}, losses=(0.0, 0.0), slopes={"m": 0.0}))
    assert merger.report.raw_coefficient == 1.0
    merger.fold(running, adapters[1], Fisher({"m": second}, losses=(0.0, 0.0), slopes={"m": 0.0}))
    assert 0 < merger.report.raw_coefficient < 1
    # a penalty of weight 1 stops training where the past's rise is as steep as the loss falls: alpha is 1
    merger = Merger("optimal", fisher_scale="measured")
    running = merger.fold(None, adapters[0], Fisher({"m": first}, losses=(4.0, 2.0), slopes={"m": 0.0}))
    rise = merger.rule.past["m"].along(b)
    merger.fold(running, adapters[1], Fisher({"m": second}, losses=(4.0, 2.0), slopes={"m": -rise}))
    assert merger.report.raw_coefficient == pytest.approx(1.0, rel=1e-5)
