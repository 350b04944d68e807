"""Merge rules against their formulas, written differently, and in their limit cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft.utils import merge_utils

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import set_active
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank, from_dense
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.measure import sum_loss
from pm_llm.fisher.of_factors import Factors
from pm_llm.fisher.slopes import sum_slopes
from pm_llm.merges.base import Trained
from pm_llm.merges.opcm import project
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.helpers.merging import dense, folded
from tests.invariants.test_closed_form import random_adapter


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
    running = merger.fold(None, random_adapter(0), trained=Trained("base"))
    with pytest.raises(PmLlmError, match="must continue"):
        merger.fold(running, random_adapter(1))
    wide = Adapter({n: LowRank(torch.randn(6, 3), torch.randn(3, 5)) for n in running.factors}, running.place)
    with pytest.raises(PmLlmError, match="one rank"):
        merger.fold(running, wide, trained=Trained("base"))
    for keys in ({"method": "slao", "start": "fresh"}, {"method": "slao", "max_rank": 4}):
        with pytest.raises(PmLlmError, match=r"continues|max_rank is 4"):
            load_config(None, keys).check()


def test_a_dense_matrix_as_factors() -> None:
    for shape in ((4, 7), (7, 4)):
        x = torch.randn(shape)
        assert torch.equal(from_dense(x).dense(), x)
        assert from_dense(x).rank == 4
        assert lowrank.truncate(from_dense(x), 2)[1] == pytest.approx(float((torch.linalg.svdvals(x)[2:] ** 2).sum()))


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "dare", "magmax", "opcm", "max", "pam", "frank_wolfe"])
@pytest.mark.parametrize("continues", [True, False])
def test_one_task_is_the_identity(rule: str, continues: bool) -> None:
    options = {"density": 1.0} if rule in ("ties", "dare") else {}
    (came,), (left,), _ = folded(rule, 1, continues, **options)
    for name in came.factors:
        torch.testing.assert_close(dense(left, name), dense(came, name))


def test_task_arithmetic_is_pefts() -> None:
    came, left, _ = folded("task_arithmetic", 3, continues=False, scale=0.3)
    for name in came[0].factors:
        expected = merge_utils.task_arithmetic([dense(x, name) for x in came], torch.full((3,), 0.3))
        torch.testing.assert_close(dense(left[-1], name), expected)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_ties_is_pefts(density: float, method: str) -> None:
    came, left, _ = folded("ties", 3, continues=False, density=density, scale=0.8, majority_sign_method=method)
    for name in came[0].factors:
        vectors = [dense(x, name) for x in came]
        expected = 0.8 * merge_utils.ties(vectors, torch.ones(3), density, method)
        torch.testing.assert_close(dense(left[-1], name), expected)


def test_ties_of_density_one_trims_nothing() -> None:
    came, left, _ = folded("ties", 3, continues=False, density=1.0)
    for name in came[0].factors:
        stack = torch.stack([dense(x, name) for x in came])
        sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
        agree = stack.sign() == sign
        torch.testing.assert_close(dense(left[-1], name), (stack * agree).sum(0) / agree.sum(0).clamp(min=1))


def test_dare_is_unbiased_and_draws_the_same_again() -> None:
    came, left, _ = folded("dare", 2, continues=False, density=0.5, seed=3)
    _, again, _ = folded("dare", 2, continues=False, density=0.5, seed=3)
    total = torch.zeros(6, 5)
    for seed in range(400):
        total += dense(folded("dare", 2, continues=False, density=0.5, seed=seed)[1][-1], "one") / 400
    expected = dense(came[0], "one") + dense(came[1], "one")
    assert (total - expected).abs().max() < 0.25 * expected.abs().max()
    kept = dense(folded("dare", 1, continues=False, density=0.5)[1][0], "one")
    share = float((kept != 0).float().mean())
    torch.testing.assert_close(kept[kept != 0], 2 * dense(came[0], "one")[kept != 0])
    assert 0.2 < share < 0.8
    assert torch.equal(dense(left[-1], "one"), dense(again[-1], "one"))
    _, whole, _ = folded("dare", 2, continues=False, density=1.0)
    torch.testing.assert_close(dense(whole[-1], "one"), expected)


def test_magmax_takes_what_went_furthest() -> None:
    came, left, _ = folded("magmax", 4, continues=True)
    for name in came[0].factors:
        stack = torch.stack([dense(x, name) for x in came])
        expected = stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]
        torch.testing.assert_close(dense(left[-1], name), expected)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_opcm_projection_against_a_dense_one(variant: str) -> None:
    """By the full SVD, with every direction named; and the directions it leaves out are out."""
    torch.manual_seed(0)
    before = LowRank(torch.randn(6, 4).double(), torch.randn(4, 5).double())
    x = LowRank(torch.randn(6, 3).double(), torch.randn(3, 5).double())
    found = project(before, x, 0.5, variant).dense()
    u, s, vh = torch.linalg.svd(before.dense())
    k = next(i for i in range(1, 5) if s[:i].sum() >= 0.5 * s.sum())
    expected = torch.zeros(6, 5).double()
    for i in range(6):
        for j in range(5):
            keep = (i >= k and j >= k) if variant == "paper" else (i >= k - 1 or j >= k - 1)
            if keep and not (i == j and i < 4):
                expected += (u[:, i] @ x.dense() @ vh[j]) * torch.outer(u[:, i], vh[j])
    torch.testing.assert_close(found, expected)
    if variant == "paper":
        assert (u[:, :k].T @ found).abs().max() < 1e-10
        assert (found @ vh[:k].T).abs().max() < 1e-10


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_opcm_keeps_the_mean_norm(variant: str) -> None:
    came, left, _ = folded("opcm", 4, continues=True, variant=variant)
    for name in came[0].factors:
        for t in range(1, 5):
            norms = [dense(x, name).norm() for x in came[:t]]
            assert dense(left[t - 1], name).norm() == pytest.approx(float(sum(norms) / t), rel=1e-4)


def test_opcm_leaves_a_module_that_no_task_has_moved() -> None:
    merger, running = Merger("opcm"), None
    for t in range(3):
        new = random_adapter(t)
        if t < 2:
            still = new.factors["one"]
            new = new.replace_factors({**new.factors, "one": LowRank(torch.zeros_like(still.B), still.A)})
        running = merger.fold(running, new, trained=Trained("base"))
        assert bool(dense(running, "one").any()) == (t == 2)
        assert all(bool(torch.isfinite(dense(running, name)).all()) for name in new.factors)


@pytest.mark.parametrize("rule", ["ties", "dare", "opcm", "slao", "exponential"])
def test_state_goes_on_where_it_was(rule: str) -> None:
    whole, running = Merger(rule, max_rank=3), None
    for t in range(4):
        again = Merger(rule, max_rank=3)
        again.load_state_dict({key: x.clone() for key, x in whole.state_dict().items()}, whole.tasks)
        if rule == "slao":
            again.max_rank = whole.max_rank = None
        other = again.fold(running, random_adapter(t), trained=Trained("base"))
        running = whole.fold(running, random_adapter(t), trained=Trained("base"))
        assert all(torch.equal(other.factors[n].B, x.B) for n, x in running.factors.items())


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ({"name": "ties", "density": 0}, "above 0"),
        ({"name": "ties", "majority_sign_method": "vote"}, "total or frequency"),
        ({"name": "dare", "density": 1.5}, "above 0 to 1"),
        ({"name": "opcm", "variant": "mine"}, "paper or reference"),
        ({"name": "opcm", "threshold": 0}, "above 0"),
        ({"name": "task_arithmetic", "scale": "half"}, "a finite number"),
    ],
)
def test_options_out_of_range(merge: dict, expected: str) -> None:
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, {"merge": merge}).check()


@pytest.mark.parametrize("rule", ["ties", "dare", "max", "sum", "task_arithmetic"])
def test_vectors_of_adapters_that_began_at_the_base_are_they_themselves(rule: str) -> None:
    """`start: alone`: the same as of fresh adapters, whose task vectors they are."""
    _, fresh, _ = folded(rule, 3, continues=False)
    merger, running = Merger(rule), None
    for t in range(3):
        running = merger.fold(running, random_adapter(t), trained=Trained("base", "base"))
    for name in running.factors:
        torch.testing.assert_close(dense(running, name), dense(fresh[-1], name))


@pytest.mark.parametrize(("rule", "option"), [("constant", {"coefficient": 0.3}), ("exponential", {"decay": 0.4})])
def test_averages_of_the_factors_keep_the_rank(rule: str, option: dict) -> None:
    came, left, used = folded(rule, 4, continues=True, space="factors", **option)
    for name in came[0].factors:
        expected = came[0].factors[name].B
        for x, share in zip(came[1:], used[1:], strict=True):
            expected = (1 - share) * expected + share * x.factors[name].B
        torch.testing.assert_close(left[-1].factors[name].B, expected)
    assert left[-1].rank == came[0].rank


# ---- merges of the factors, and of what is stored ----
def measured(seed: int) -> Fisher:
    """A random Fisher of the factors of `random_adapter`."""
    found = random_adapter(seed).factors
    return Fisher({name: Factors(x.B**2, x.A**2) for name, x in found.items()})


def test_cofima_is_the_fisher_weighted_mean_of_each_entry() -> None:
    for past in ("last", "sum"):
        merger, running = Merger("cofima", weight=0.3 if past == "last" else 0.5, past=past), None
        came, fishers = [random_adapter(t) for t in range(3)], [measured(10 + t) for t in range(3)]
        for new, fisher in zip(came, fishers, strict=True):
            again = Merger("cofima", weight=merger.rule.weight, past=past)
            again.load_state_dict({k: x.clone() for k, x in merger.state_dict().items()}, merger.tasks)
            merged = again.fold(running, new, fisher, trained=Trained("base"))
            if past == "last" and running is not None:
                f, p = fisher.modules["one"], fishers[again.tasks - 2].modules["one"]
                expected = (0.3 * f.A * new.factors["one"].A + 0.7 * p.A * running.factors["one"].A) / (
                    0.3 * f.A + 0.7 * p.A
                )
                torch.testing.assert_close(merged.factors["one"].A, expected, atol=1e-5, rtol=1e-4)
            merger, running = again, merged
        if past == "sum":  # each entry at the minimum of all tasks' quadratics
            for side in ("A", "B"):
                weights = [getattr(f.modules["one"], side) for f in fishers]
                values = [getattr(x.factors["one"], side) for x in came]
                expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
                torch.testing.assert_close(getattr(running.factors["one"], side), expected, atol=1e-4, rtol=1e-3)


def test_cofima_of_a_fisher_that_says_nothing_is_the_mean() -> None:
    merger = Merger("cofima", weight=0.25)
    nothing = Fisher({n: Factors(0 * x.B, 0 * x.A) for n, x in random_adapter(0).factors.items()})
    first = merger.fold(None, random_adapter(0), nothing, trained=Trained("base"))
    second = merger.fold(first, random_adapter(1), nothing, trained=Trained("base"))
    for name, x in second.factors.items():
        expected = 0.75 * first.factors[name].A + 0.25 * random_adapter(1).factors[name].A
        torch.testing.assert_close(x.A, expected)


@pytest.mark.parametrize("weight", ["half", "count"])
def test_pam_averages_the_factors(weight: str) -> None:
    came, left, used = folded("pam", 3, continues=True, weight=weight)
    shares = [1, 0.5, 0.5] if weight == "half" else [1, 1 / 2, 1 / 3]
    assert used == pytest.approx(shares)
    for name in came[0].factors:
        expected = came[0].factors[name].A
        for x, share in zip(came[1:], shares[1:], strict=True):
            expected = expected + share * (x.factors[name].A - expected)
        torch.testing.assert_close(left[-1].factors[name].A, expected)
    assert left[-1].rank == came[0].rank


def test_max_takes_the_largest_of_the_elected_sign() -> None:
    came, left, _ = folded("max", 3, continues=False)
    for name in came[0].factors:
        stack = torch.stack([dense(x, name) for x in came])
        found = dense(left[-1], name)
        for place in range(stack[0].numel()):
            values = [float(x.flatten()[place]) for x in stack]
            expected = max(values) if sum(values) > 0 else min(values)
            assert float(found.flatten()[place]) == pytest.approx(expected, abs=1e-6)


def test_frank_wolfe_moves_to_what_the_loss_asks_for() -> None:
    """On a quadratic whose minimum is one of the adapters, and without steps the plain mean."""
    target = random_adapter(1)

    def slopes(at, towards) -> list[float]:
        return [sum(float(((at[n].dense() - dense(target, n)) * one[n].dense()).sum()) for n in at) for one in towards]

    def distance(adapter: Adapter) -> float:
        return sum(float((dense(adapter, n) - dense(target, n)).norm() ** 2) for n in adapter.factors)

    found = {}
    for steps in (0, 40):
        merger, running = Merger("frank_wolfe", steps=steps), None
        for t in range(3):
            running = merger.fold(
                running, random_adapter(t), trained=Trained("base", probe=SimpleNamespace(slopes=slopes))
            )
        found[steps] = running
        assert sum(merger.rule.weights_of) == pytest.approx(1)
        assert merger.report.coefficient == pytest.approx(merger.rule.weights_of[-1])
    for name in found[0].factors:
        mean = sum(dense(random_adapter(t), name) for t in range(3)) / 3
        torch.testing.assert_close(dense(found[0], name), mean)
    assert distance(found[40]) < 0.02 * distance(found[0])
    with pytest.raises(PmLlmError, match="probe"):
        Merger("frank_wolfe").fold(found[0], random_adapter(3), trained=Trained("base"))


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_the_derivatives_of_the_loss(family: str) -> None:
    model = make_peft(family, random_b=True).eval()
    batches = [batch_of(family, features(family, 4))]
    here = Adapter.from_model(model, "default")
    towards = [
        here.replace_factors({n: LowRank(torch.randn_like(x.B), x.A) for n, x in here.factors.items()}).factors
        for _ in range(2)
    ]
    found = sum_slopes(model, batches, towards)
    for one, slope in zip(towards, found, strict=True):
        losses = []
        for size in (1e-3, -1e-3):
            moved = {n: lowrank.add(x, one[n].scale(size)) for n, x in here.factors.items()}
            here.replace_factors(moved).attach(model, "moved")
            set_active(model, ["moved"], trainable="moved")
            losses.append(sum_loss(model, batches)[0])
        set_active(model, ["default"], trainable="default")
        assert float(slope) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    ("start", "merge", "expected"),
    [
        ("alone", {"name": "optimal", "fisher_scale": "measured"}, "measured needs a start at the merged model"),
        ("last", {"name": "optimal", "fisher_scale": "measured"}, "measured needs a start at the merged model"),
        ("last", {"name": "transfer", "adapter": "V"}, "not at the last adapter as it was trained"),
        ("orthogonal", "cofima", "start that keeps A and B"),
        ("orthogonal", {"name": "optimal", "space": "factors"}, "start that keeps A and B"),
    ],
)
def test_rules_refuse_starts_that_break_their_meaning(start, merge, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_adapter(7).save("V")
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, {"method": "inclora", "start": start, "merge": merge}).check()


@pytest.mark.parametrize("rule", ["dare", "frank_wolfe", "opcm", "optimal"])
def test_a_fold_that_failed_can_be_tried_again(rule: str) -> None:
    """Its task counts once."""

    def full(*shape: int) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    def folded_after(failures: int) -> Adapter:
        merger, running = Merger(rule), None
        for t in range(3):
            new = random_adapter(t)
            fisher = {name: x.dense() ** 2 for name, x in new.factors.items()} if rule == "optimal" else None
            probe = SimpleNamespace(slopes=lambda at, ways: [0.0] * len(ways))
            merger.zeros = full
            for _ in range(failures):
                with pytest.raises(OSError, match="No space"):
                    merger.fold(running, new, fisher, trained=Trained("base", probe=probe))
            merger.zeros = None
            running = merger.fold(running, new, fisher, trained=Trained("base", probe=probe))
        assert merger.tasks == 3
        return running

    straight, after_failures = folded_after(0), folded_after(2)
    for name in straight.factors:
        assert torch.equal(dense(after_failures, name), dense(straight, name))


def test_ranks_do_not_grow_beyond_what_a_matrix_can_have() -> None:
    """`M + a (theta - M)` is `(1 - a) M + a theta`, whose rank grows by one adapter's."""
    came, left, _ = folded("average", 8, continues=True)
    for name, x in left[-1].factors.items():
        expected = sum(dense(one, name) for one in came) / 8
        torch.testing.assert_close(dense(left[-1], name), expected, atol=1e-5, rtol=1e-4)
        ranks = [one.factors[name].rank for one in left]
        first, full = came[0].factors[name].rank, min(x.shape)
        assert ranks == [min((t + 1) * first, max(full, first)) for t in range(8)]
