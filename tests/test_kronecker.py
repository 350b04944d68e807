"""The Kronecker Fisher against autograd and against its whole matrix."""

from __future__ import annotations

import pytest
import torch

from pm_llm import ContinualSequence, Merger
from pm_llm.adapters import Adapter, lora_layers
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.fisher import Fisher, Room, past_of
from pm_llm.fisher.kronecker import Kept, Kronecker, KroneckerPast, Side
from pm_llm.fisher.measure import answer_loss, sum_fisher
from pm_llm.lowrank import LowRank
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.invariants.test_closed_form import random_adapter
from tests.test_sequence import config_for

OUT, IN = 6, 5  # of random_adapter's modules


def fisher_like(seed: int, examples: int = 20, rank: int = 3) -> Kronecker:
    torch.manual_seed(seed)
    G = torch.randn(examples, OUT, rank) @ torch.randn(rank, IN)
    return Kronecker((G @ G.mT).mean(0), (G.mT @ G).mean(0))


def matrix(fisher: Kronecker) -> torch.Tensor:
    """F on the entries of a (d_out, d_in) matrix, row by row."""
    return torch.kron(fisher.R.double(), fisher.C.double()) / fisher.R.double().trace()


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_each_examples_gradient(family: str) -> None:
    """And its diagonal has the sums of the factored form."""
    model = make_peft(family, random_b=True).eval()
    rows = features(family, 3, "sentiment") + features(family, 3, "puzzle")
    batches = [batch_of(family, rows[:4]), batch_of(family, rows[4:])]
    found = sum_fisher(model, batches, "kronecker").mean().modules
    factored = sum_fisher(model, batches, "factored").mean().modules
    weights = {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}
    for w in weights.values():
        w.requires_grad_(True)
    expected = {name: [0.0, 0.0] for name in weights}
    for row in rows:
        gradients = torch.autograd.grad(answer_loss(model, batch_of(family, [row])), list(weights.values()))
        for name, G in zip(weights, gradients, strict=True):
            expected[name] = [expected[name][0] + G @ G.T / len(rows), expected[name][1] + G.T @ G / len(rows)]
    for name, (R, C) in expected.items():
        torch.testing.assert_close(found[name].R, R, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[name].C, C, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[name].R.diagonal(), factored[name].r, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[name].C.diagonal(), factored[name].c, rtol=1e-3, atol=1e-7)
        assert found[name].trace() == pytest.approx(factored[name].trace(), rel=1e-3)


def test_quadratics_are_those_of_the_whole_matrix() -> None:
    """inner, along, pull, the penalty and its gradient, with all directions kept."""
    room, past, tasks = Room(pairs=4, rank=32, directions=8), None, []
    for t in range(3):
        theta, fisher = random_adapter(t).factors["one"], fisher_like(t)
        past = KroneckerPast.plus(past, fisher, theta, room)
        tasks.append((matrix(fisher), theta.dense().double().flatten(), fisher))
    past = past_of({name: x.clone() for name, x in past.tensors().items()})
    running, delta = (random_adapter(seed).factors["one"] for seed in (8, 9))
    M, D = running.dense().double().flatten(), delta.dense().double().flatten()
    for F, _, fisher in tasks:
        assert fisher.inner(running, delta) == pytest.approx(float(M @ F @ D), rel=1e-4)
    assert past.along(delta) == pytest.approx(float(sum(D @ F @ D for F, _, _ in tasks)), rel=1e-4)
    expected = float(sum((theta - M) @ F @ D for F, theta, _ in tasks))
    assert past.pull(running, delta) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    B, A = delta.B.double().requires_grad_(True), delta.A.double().requires_grad_(True)
    gaps = [(F, M + (B @ A).flatten() - theta, M - theta) for F, theta, _ in tasks]
    cost = sum(here @ F @ here - before @ F @ before for F, here, before in gaps) / 2
    cost.backward()
    b, a = delta.B.clone().requires_grad_(True), delta.A.clone().requires_grad_(True)
    found = past.penalty(running)(LowRank(b, a))
    assert found.item() == pytest.approx(cost.item(), rel=1e-4)
    found.backward()
    torch.testing.assert_close(b.grad.double(), B.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a.grad.double(), A.grad, rtol=1e-3, atol=1e-5)


def test_what_past_tasks_do_not_see_costs_them_nothing() -> None:
    """Where a diagonal says otherwise: rows of A orthogonal to past inputs, columns of B to past output gradients."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(IN, IN))[0].T
    G = torch.randn(20, OUT, 2) @ basis[:2]  # inputs in two directions
    fisher = Kronecker((G @ G.mT).mean(0), (G.mT @ G).mean(0))
    theta = random_adapter(1).factors["one"]
    past = KroneckerPast.plus(None, fisher, theta, Room())
    seen, unseen = LowRank(torch.randn(OUT, 2), basis[:2]), LowRank(torch.randn(OUT, 2), basis[2:4])
    assert past.along(unseen) < 1e-5 * past.along(seen)
    assert fisher.inner(unseen, unseen) < 1e-5 * fisher.inner(seen, seen)
    diagonal = fisher.R.diagonal()[:, None] * fisher.C.diagonal() / fisher.R.trace()
    assert float((diagonal * unseen.dense() ** 2).sum()) > 0.1 * float((diagonal * seen.dense() ** 2).sum())
    # so such a task is merged whole, though it has a Fisher of its own
    first = random_adapter(1)
    merger = Merger("optimal")
    running = merger.fold(None, first, Fisher(dict.fromkeys(first.factors, fisher)))
    new = first.replace_factors(dict.fromkeys(first.factors, unseen))
    merger.fold(running, new, Fisher(dict.fromkeys(first.factors, fisher_like(5))))
    assert merger.report.raw_coefficient == pytest.approx(1.0, abs=1e-4)


def test_equal_fishers_give_one_over_t_and_joining_them_costs_nothing() -> None:
    merger, running = Merger("optimal"), None
    for t in range(1, 9):
        new = random_adapter(t)
        running = merger.fold(running, new, Fisher(dict.fromkeys(new.factors, fisher_like(0))))
        assert merger.report.raw_coefficient == pytest.approx(1 / t, rel=1e-3)
        assert merger.report.curvature_errors["S"] < 1e-3
        again = Merger("optimal")
        again.load_state({key: x.clone() for key, x in merger.state().items()}, merger.tasks)
        assert again.state().keys() == merger.state().keys()
        assert all(torch.equal(x, again.state()[key]) for key, x in merger.state().items())


def whole(past: KroneckerPast) -> torch.Tensor:
    sides = [
        [V.T @ V + torch.diag(d) for V, d in zip(s.V.double(), s.d.double(), strict=True)] for s in (past.R, past.C)
    ]
    return sum(torch.kron(R, C) / R.trace() for R, C in zip(*sides, strict=True))


def test_joining_keeps_the_diagonal_sums_and_states_its_error() -> None:
    past, room, before = None, Room(pairs=2, rank=4, directions=8), None
    for t in range(6):
        fisher = fisher_like(t)
        past = KroneckerPast.plus(past, fisher, random_adapter(t).factors["one"], room)
        rows, columns = past.sums()
        expected = [sum(getattr(fisher_like(i), side).diagonal() for i in range(t + 1)) for side in "RC"]
        torch.testing.assert_close(rows, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(columns, expected[1], rtol=1e-4, atol=1e-5)
        if t >= 2:
            S = before + matrix(fisher)
            lost, total, _, _ = past.errors()
            assert lost == pytest.approx(float((S - whole(past)).square().sum()), rel=1e-2)
            assert total == pytest.approx(float(S.square().sum()), rel=1e-3)
        before = whole(past)
    assert past.R.V.shape[0] == 2
    assert past.m.rank == 4


def test_the_cut_of_joined_sides_is_part_of_the_stated_error() -> None:
    past, room, before = None, Room(pairs=2, rank=4, directions=1), None
    for t in range(6):
        few = fisher_like(t).kept(room)
        fisher = Kept(few.R, few.C, 0.0)  # has no more directions than are kept: only joining cuts
        past = KroneckerPast.plus(past, fisher, random_adapter(t).factors["one"], room)
        if t >= 2:
            S = before + whole(KroneckerPast.plus(None, fisher, random_adapter(t).factors["one"], room))
            assert past.errors()[0] == pytest.approx(float((S - whole(past)).square().sum()), rel=1e-3)
        before = whole(past)


def test_joining_keeps_the_slope_where_the_model_is() -> None:
    """What is cut from S, times the whole adapter, would be a slope that the past tasks do not have."""
    past, room = None, Room(pairs=2, rank=40, directions=8)
    for t in range(6):
        theta, delta = random_adapter(t).factors["one"], random_adapter(10 + t).factors["one"]
        before = past.pull(theta, delta) if past is not None else 0.0
        past = KroneckerPast.plus(past, fisher_like(t), theta, room)  # whose own slope is none at its theta
        assert past.pull(theta, delta) == pytest.approx(before, rel=1e-3, abs=1e-3)
    assert past.errors()[0] > 1e-3 * past.errors()[1]


def test_few_directions_keep_the_leading_ones_and_the_diagonal() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, IN) * torch.tensor([10.0, 5, 1, 0.5, 0.1])
    M = x.T @ x
    side = Side.of(M, 2)
    assert side.V.shape == (1, 2, IN)
    torch.testing.assert_close(side.diagonals()[0], M.diagonal(), rtol=1e-4, atol=1e-4)
    kept = side.V[0].T @ side.V[0] + torch.diag(side.d[0])
    best = torch.linalg.svdvals(M)[2:]
    assert float((M - kept).norm()) <= float(best.norm()) * 1.001
    y, z = torch.randn(IN, 3), torch.randn(IN, 2)
    torch.testing.assert_close(side.form(y, z)[0], y.T @ kept @ z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(side.times(y)[0], kept @ y, rtol=1e-3, atol=1e-3)
    both = side.with_terms(Side.of(2 * M, 4)).joined(0, 1, 5)
    torch.testing.assert_close(both.diagonals()[0], 3 * M.diagonal(), rtol=1e-4, atol=1e-3)


def test_the_cut_to_directions_is_told_and_the_tasks_own_quadratic_is_taken_with_it() -> None:
    fisher, theta = fisher_like(0), random_adapter(0).factors["one"]
    past = KroneckerPast.plus(None, fisher, theta, Room(directions=1))
    lost, total, _, _ = past.errors()
    assert lost == pytest.approx(float((matrix(fisher) - whole(past)).square().sum()), rel=1e-4)
    assert total == pytest.approx(float(whole(past).square().sum()), rel=1e-4)
    assert lost > 0.01 * total
    half = KroneckerPast.plus(None, fisher.divided(2.0), theta, Room(directions=1)).errors()
    of_half = KroneckerPast.plus(None, fisher.kept(Room(directions=1)).divided(2.0), theta, Room()).errors()
    for one in (half, of_half):
        assert one[:2] == pytest.approx((lost / 4, total / 4))
    merger, running = Merger("optimal", directions=1), None
    for t in range(1, 6):  # equal Fishers, of which little is kept, still give 1/t
        new = random_adapter(t)
        running = merger.fold(running, new, Fisher(dict.fromkeys(new.factors, fisher)))
        assert merger.report.raw_coefficient == pytest.approx(1 / t, rel=1e-3)
        assert merger.report.curvature_errors["S"] > 0.1 / t


def test_a_large_matrix_is_cut_without_its_decomposition() -> None:
    """As well as with it, to a thousandth, where eigenvalues fall as 1 / k; twice the same."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300))[0]
    M = basis @ torch.diag(1 / torch.arange(1.0, 301)) @ basis.T
    side, again = Side.of(M, 8), Side.of(M, 8)
    assert torch.equal(side.V, again.V)
    values, vectors = torch.linalg.eigh(M.double())
    best = (values.sqrt() * vectors).T.flip(0)[:8]
    assert float((M - side.V[0].T @ side.V[0]).norm()) < 1.001 * float((M - best.T @ best).norm())
    torch.testing.assert_close(side.diagonals()[0], M.diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_model_fold(family: str) -> None:
    model = make_peft(family, random_b=True)
    fisher = sum_fisher(model, [batch_of(family, features(family, 4))], "kronecker").mean()
    new = Adapter.from_model(model, "default")
    merger = Merger("optimal", pairs=1, rank=2, directions=3, fisher_scale="own")
    running = merger.fold(None, new, fisher)
    merger.fold(running, new, fisher)
    assert merger.report.raw_coefficient < 0.6
    assert merger.report.curvature_errors["m"] > 0


def test_the_merge_may_name_its_form(pico_folders, tmp_path) -> None:
    found = []
    for i, keys in enumerate(({"fisher.form": "kronecker"}, {"merge": {"name": "optimal", "form": "kronecker"}}, {})):
        config = config_for(pico_folders["llama"], tmp_path / str(i), **{"evaluate": "final", **keys})
        found.append(ContinualSequence(config).run()["raw_coefficients"])
    assert found[0] == found[1] != found[2]
    with pytest.raises(PmLlmError, match="Unset form, or space"):
        load_config(None, {"method": "pm_curvature", "space": "factors"}).check()
    with pytest.raises(PmLlmError, match="None or dense or factored or kronecker"):
        Merger("optimal", form="diagonal")
