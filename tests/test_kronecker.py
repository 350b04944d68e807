"""The Kronecker Fisher against autograd and against its whole matrix."""

from __future__ import annotations

import pytest
import torch

from pm_llm import ContinualSequence, Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.families.base import family_of
from pm_llm.fisher import moments
from pm_llm.fisher.base import Fisher, Room, past_of
from pm_llm.fisher.kronecker import Kronecker, KroneckerPast
from pm_llm.fisher.measure import sum_fisher
from pm_llm.fisher.sides import Sides
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.helpers.runs import config_for
from tests.invariants.test_closed_form import random_adapter

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
        gradients = torch.autograd.grad(family_of(model).loss(model, batch_of(family, [row])), list(weights.values()))
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
    room, past, tasks, running = Room(pairs=4, rank=32, directions=8), None, [], None
    for t in range(3):
        theta, fisher = random_adapter(t).factors["one"], fisher_like(t)
        merged = random_adapter(8 + t).factors["one"]
        past = KroneckerPast.plus(past, fisher, theta, room, merged, running)
        running = merged
        tasks.append((matrix(fisher), theta.dense().double().flatten(), fisher))
    cut = random_adapter(12).factors["one"]  # by a truncation, say
    past.moved(LowRank(torch.cat([cut.B, -running.B], 1), torch.cat([cut.A, running.A])), room)
    past = past_of({name: x.clone() for name, x in past.tensors().items()})
    running, delta = cut, random_adapter(9).factors["one"]
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
        assert merger.report.curvature_errors["own"] < 1e-3
        again = Merger("optimal")
        again.load_state_dict({key: x.clone() for key, x in merger.state_dict().items()}, merger.tasks)
        assert again.state_dict().keys() == merger.state_dict().keys()
        assert all(torch.equal(x, again.state_dict()[key]) for key, x in merger.state_dict().items())


def test_few_directions_keep_the_leading_ones_and_the_diagonal() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, IN) * torch.tensor([10.0, 5, 1, 0.5, 0.1])
    M = x.T @ x
    side = Sides.of(M, 2)
    assert side.U.shape == (2, IN)
    torch.testing.assert_close(side.diagonals()[0], M.diagonal(), rtol=1e-4, atol=1e-4)
    kept = matrices(side)[0]
    best = torch.linalg.svdvals(M)[2:]
    assert float((M - kept).norm()) <= float(best.norm()) * 1.001
    y, z = torch.randn(IN, 3), torch.randn(IN, 2)
    torch.testing.assert_close(side.form(y, z)[0], y.T @ kept @ z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(side.times(y)[0], kept @ y, rtol=1e-3, atol=1e-3)
    both = side.with_terms(Sides.of(2 * M, 4), 5)
    torch.testing.assert_close(matrices(both)[0], kept, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.traces(), torch.stack([M.trace(), 2 * M.trace()]), rtol=1e-4, atol=1e-4)
    joined = both.joined(0, 1, 0.5, 2.0, 5)
    torch.testing.assert_close(joined.diagonals()[0], 4.5 * M.diagonal(), rtol=1e-4, atol=1e-3)
    # what the basis has no room for is charged as a diagonal: no trace is lost
    narrow = side.with_terms(Sides.of(torch.eye(IN), 4), 2)
    assert narrow.U.shape == (2, IN)
    torch.testing.assert_close(
        narrow.traces(), torch.stack([M.trace(), torch.tensor(float(IN))]), rtol=1e-4, atol=1e-4
    )


def matrices(side: Sides) -> torch.Tensor:
    return torch.stack([side.U.T @ G.T @ G @ side.U + torch.diag(d) for G, d in zip(side.G, side.d, strict=True)])


def test_the_cut_to_directions_is_told_and_the_tasks_own_quadratic_is_taken_with_it() -> None:
    fisher, theta = fisher_like(0), random_adapter(0).factors["one"]
    past = KroneckerPast.plus(None, fisher, theta, Room(directions=1))
    (kept,), (exact,) = past.kept_along()
    assert exact == pytest.approx(fisher.inner(theta, theta), rel=1e-4)
    assert kept == pytest.approx(past.along(theta), rel=1e-4)
    assert abs(kept / exact - 1) > 0.01
    for half in (fisher.divided(2.0), fisher.kept(Room(directions=1)).divided(2.0)):
        found = KroneckerPast.plus(None, half, theta, Room(directions=1)).kept_along()
        assert found == (pytest.approx([kept / 2]), pytest.approx([exact / 2]))
    merger, running = Merger("optimal", directions=1), None
    for t in range(1, 6):  # equal Fishers, of which little is kept, still give 1/t
        new = random_adapter(t)
        running = merger.fold(running, new, Fisher(dict.fromkeys(new.factors, fisher)))
        assert merger.report.raw_coefficient == pytest.approx(1 / t, rel=1e-3)
        assert merger.report.curvature_errors["own"] > 0.01


def test_a_large_matrix_is_cut_without_its_decomposition() -> None:
    """As well as with it, to a thousandth, where eigenvalues fall as 1 / k; twice the same."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300))[0]
    M = basis @ torch.diag(1 / torch.arange(1.0, 301)) @ basis.T
    side, again = Sides.of(M, 8), Sides.of(M, 8)
    assert torch.equal(side.U, again.U)
    values, vectors = torch.linalg.eigh(M.double())
    best = (values.sqrt() * vectors).T.flip(0)[:8]
    V = side.G[0] @ side.U
    assert float((M - V.T @ V).norm()) < 1.001 * float((M - best.T @ best).norm())
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
    assert merger.report.curvature_errors["slope"] > 0


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


@pytest.mark.parametrize("decay", [2.0, 1.0])
def test_a_sketch_is_near_the_whole(decay: float) -> None:
    """Where a side is wide only `M O` and the diagonal are summed: the cut to the leading directions is nearly as good
    as that of the whole matrix, traces and diagonals are exact, and sums are those of all rows."""
    d, directions = 320, 32
    torch.manual_seed(0)
    g = torch.randn(4, 200, d) * torch.arange(1, d + 1) ** (-decay / 2) @ torch.linalg.qr(torch.randn(d, d))[0]
    between = torch.eye(200).expand(4, 200, 200)
    whole = g.flatten(0, 1).T @ g.flatten(0, 1)
    halves = [moments.blank(d, torch.device("cpu")) for _ in range(2)]
    for half, rows in zip(halves, g.split(2), strict=True):
        moments.add(half, rows, between[:2])
    M = halves[0] + halves[1]
    assert M.shape == (d, moments.COLUMNS + 1)
    assert float(moments.trace(M)) == pytest.approx(float(whole.trace()), rel=1e-5)
    found, best = moments.sides(M, directions), Sides.of(whole, directions)
    torch.testing.assert_close(found.diagonals()[0], whole.diagonal(), rtol=1e-3, atol=1e-3 * float(whole.max()))
    errors = [float((matrices(side)[0] - whole).norm()) for side in (found, best)]
    assert errors[0] < 1.3 * errors[1]
    x, y = torch.randn(d, 2), torch.randn(d, 3)
    near = matrices(moments.sides(M, moments.COLUMNS))[0].double()
    torch.testing.assert_close(moments.form(M, x, y), x.T.double() @ near @ y.double(), rtol=1e-3, atol=1e-2)
    rows = moments.rows(M)
    assert float((rows.T @ rows - whole).norm()) < 1.3 * errors[1]


def test_a_sketch_of_few_directions_is_exact() -> None:
    """Fewer than it has columns; of none it is nothing."""
    d = 300
    torch.manual_seed(0)
    g = torch.randn(1, 7, 20) @ torch.randn(20, d)
    M = moments.blank(d, torch.device("cpu"))
    assert float(matrices(moments.sides(M, 32)).abs().max()) == 0
    moments.add(M, g, torch.eye(7)[None])
    whole = g[0].T @ g[0]
    found = matrices(moments.sides(M, 32))[0]
    assert float((found - whole).norm()) < 1e-3 * float(whole.norm())
    assert moments.size(d) == d * (moments.COLUMNS + 1)
    assert moments.size(64) == 64 * 64


def test_the_penalty_holds_at_any_scale_of_the_fisher() -> None:
    """Up to the largest numbers of float32: one side is divided by the trace before they are multiplied."""
    theta, delta = random_adapter(1).factors["one"], random_adapter(2).factors["one"]
    found = []
    for scale in (1.0, 1e24):
        fisher = fisher_like(0)
        past = KroneckerPast.plus(None, Kronecker(scale * fisher.R, scale * fisher.C), theta, Room())
        found.append(float(past.penalty(theta)(delta)))
    assert found[1] == pytest.approx(1e24 * found[0], rel=1e-4)


def test_a_sketch_of_what_overflowed_is_an_error() -> None:
    M = moments.blank(300, torch.device("cpu"))
    M[3, 5] = float("nan")
    with pytest.raises(PmLlmError, match="not finite"):
        moments.sides(M, 32)
