"""Law 6: the coefficient is the arg-min of the quadratic, equal Fishers give 1/t, the first task gives 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import set_active
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.measure import sum_fisher
from pm_llm.merges.base import Fold
from pm_llm.merges.merger import Merger
from pm_llm.merges.optimal import Optimal
from tests.conftest import FAMILIES, batch_of, features, make_peft, targets


def argmin(function: Callable[[float], float], low: float = -3.0, high: float = 4.0) -> float:
    """By repeated grids, knowing nothing of the function but that it has one minimum."""
    for _ in range(12):
        grid = torch.linspace(low, high, 41, dtype=torch.float64).tolist()
        best = min(grid, key=function)
        low, high = best - (high - low) / 40, best + (high - low) / 40
    return best


def dense(factors: dict[str, LowRank]) -> dict[str, torch.Tensor]:
    return {name: x.B.double() @ x.A.double() for name, x in factors.items()}


def real_tasks(family: str, count: int = 3):
    """Random task adapters and their real Fishers on a pico model, each taken at running + new."""
    model = make_peft(family, "base", random_b=True)
    for t, task in enumerate(("sentiment", "topic", "question")[:count]):
        torch.manual_seed(100 + t)
        name = f"task{t}"
        config = model.peft_config["base"].__class__(r=3, target_modules=targets(family), init_lora_weights=False)
        model.add_adapter(name, config)
        yield model, name, [batch_of(family, features(family, 4, task))]


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_is_the_brute_force_minimum_on_a_real_model(family: str) -> None:
    merger, running = Merger("optimal", clip=False), None
    fishers, optima = [], []
    for model, name, batches in real_tasks(family):
        if running is not None:
            running.attach(model, "running")
        set_active(model, [*(["running"] if running else []), name], trainable=name)
        fisher = sum_fisher(model, batches).mean()
        new = Adapter.from_model(model, name)
        past = dense(running.factors) if running else dict.fromkeys(new.factors, 0.0)
        delta = dense(new.factors)
        fishers.append({n: f.F.double() for n, f in fisher.modules.items()})
        optima.append({n: past[n] + delta[n] for n in delta})

        def objective(alpha: float, past=past, delta=delta) -> float:
            return sum(
                float((f[n] * (past[n] + alpha * delta[n] - theta[n]) ** 2).sum()) / 2
                for f, theta in zip(fishers, optima, strict=True)
                for n in delta
            )

        running = merger.fold(running, new, fisher)
        assert merger.report.raw_coefficient == pytest.approx(argmin(objective), abs=1e-4)
    assert 0.01 < merger.report.raw_coefficient < 0.99  # the last one is not trivial


LAYERED = ("model.layers.0.q", "model.layers.0.v", "model.layers.11.q", "head")


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [("module", (("one",), ("two",))), ("layer", (LAYERED[:2], LAYERED[2:3], LAYERED[3:]))],
)
def test_granularity_minimises_each_group(granularity: str, groups: tuple[tuple[str, ...], ...]) -> None:
    names = tuple(n for group in groups for n in group)
    merger, running = Merger("optimal", clip=False, granularity=granularity), None
    fishers, optima = [], []
    for t in range(3):
        new, fisher = random_adapter(t, names), random_fisher(t, names)
        past = dense(running.factors) if running else dict.fromkeys(new.factors, 0.0)
        delta = dense(new.factors)
        fishers.append(fisher)
        optima.append({n: past[n] + delta[n] for n in delta})
        running = merger.fold(running, new, fisher)
        for group in groups:

            def objective(alpha: float, group=group, past=past, delta=delta) -> float:
                pairs = list(zip(fishers, optima, strict=True))
                return sum(
                    float((f[n] * (past[n] + alpha * delta[n] - o[n]) ** 2).sum()) for n in group for f, o in pairs
                )

            for n in group:
                assert merger.report.raw_coefficients[n] == pytest.approx(argmin(objective), abs=1e-4)
    assert len(set(merger.report.raw_coefficients.values())) == len(groups)


def random_adapter(seed: int, modules: tuple[str, ...] = ("one", "two")) -> Adapter:
    torch.manual_seed(seed)
    return Adapter({n: LowRank(torch.randn(6, 2), torch.randn(2, 5)) for n in modules}, {"target_modules": ["x"]})


def random_fisher(seed: int, modules: tuple[str, ...] = ("one", "two")) -> dict[str, torch.Tensor]:
    torch.manual_seed(1000 + seed)
    return {n: torch.rand(6, 5) ** 2 for n in modules}


@pytest.mark.parametrize("granularity", ["model", "module"])
def test_equal_fishers_give_one_over_t(granularity: str) -> None:
    merger, running = Merger("optimal", granularity=granularity), None
    for t in range(1, 8):
        running = merger.fold(running, random_adapter(t), random_fisher(0))
        for value in merger.report.raw_coefficients.values():
            assert value == pytest.approx(1 / t, rel=1e-5)


def test_first_task_gives_one() -> None:
    merger = Merger("optimal")
    merger.fold(None, random_adapter(0), random_fisher(0))
    assert merger.report.coefficient == 1.0
    assert not merger.report.clipped


def test_scales_of_the_fisher() -> None:
    """With `own` and `trace` a constant factor on a task's Fisher changes nothing; with `raw` it does."""
    found = {}
    for scale in ("raw", "trace", "own"):
        for factor in (1.0, 100.0):
            merger = Merger("optimal", fisher_scale=scale)
            running = merger.fold(None, random_adapter(0), random_fisher(0))
            fisher = {n: factor * f for n, f in random_fisher(1).items()}
            merger.fold(running, random_adapter(1), fisher)
            found[scale, factor] = merger.report.raw_coefficient
    assert found["own", 1.0] == pytest.approx(found["own", 100.0], rel=1e-4)
    assert found["trace", 1.0] == pytest.approx(found["trace", 100.0], rel=1e-4)
    assert found["raw", 100.0] > found["raw", 1.0] + 0.1


def test_linear_model_gives_the_minimum_of_the_true_loss() -> None:
    """Least squares on one-hot inputs has a diagonal, constant Hessian: the expansion is the loss itself."""
    torch.manual_seed(0)
    out, width = 4, 6
    rule, running, losses = Optimal(clip=False), {}, []
    for t in range(4):
        seen = torch.randint(0, width, (30,))
        strength = torch.rand(30, 1, dtype=torch.float64) + 0.5
        x = torch.nn.functional.one_hot(seen, width).double() * strength
        y = torch.randn(30, out, dtype=torch.float64)
        # the optimum of this task, where its inputs reach; elsewhere it stays at the running weights
        hessian = (x**2).sum(0).expand(out, width)
        past = running["w"].dense() if running else torch.zeros(out, width, dtype=torch.float64)
        optimum = torch.where(hessian > 0, (y.T @ x) / hessian.clamp(min=1e-12), past)
        losses.append(lambda w, x=x, y=y: float(((y - x @ w.T) ** 2).sum()) / 2)
        identity = torch.eye(width, dtype=torch.float64)
        delta = LowRank(optimum - past, identity)
        fold = Fold(t + 1, running, {"w": delta}, fisher=Fisher.of({"w": hessian}))
        alpha = rule.coefficients(fold).raw["w"]
        best = argmin(lambda a, past=past, delta=delta: sum(f(past + a * delta.dense()) for f in losses))
        assert alpha == pytest.approx(best, abs=1e-4)
        running = {"w": LowRank(past + alpha * delta.dense(), identity)}
    assert 0 < alpha < 1


def test_clipping_is_recorded() -> None:
    rule = Optimal()
    adapter, far = random_adapter(0), random_adapter(1)
    merger = Merger(rule)
    running = merger.fold(None, adapter, random_fisher(0))
    # the past wants minus the new direction: its optimum lies on the other side of the running adapter
    for n, past in rule.past.items():
        past.m -= 50 * random_fisher(0)[n] * far.factors[n].dense()
    merger.fold(running, far, random_fisher(1))
    assert merger.report.clipped
    assert merger.report.coefficient == 0.0
    assert merger.report.raw_coefficient < 0


def test_zero_task_vector_is_an_error_that_names_the_module() -> None:
    still = Adapter({"one": LowRank(torch.zeros(6, 2), torch.randn(2, 5))}, {"target_modules": ["x"]})
    with pytest.raises(PmLlmError, match=r"module one.*learning rate"):
        Merger("optimal", granularity="module").fold(None, still, {"one": torch.rand(6, 5)})


def test_running_adapter_without_its_history_is_refused() -> None:
    with pytest.raises(PmLlmError, match="load_state"):
        Merger("optimal").fold(random_adapter(0), random_adapter(1), random_fisher(1))


def test_state_goes_on_where_it_was() -> None:
    whole, first = Merger("optimal"), Merger("optimal")
    running = whole.fold(None, random_adapter(0), random_fisher(0))
    first.fold(None, random_adapter(0), random_fisher(0))
    second = Merger("optimal")
    second.load_state_dict(first.state_dict(), first.tasks)
    a = whole.fold(running, random_adapter(1), random_fisher(1))
    b = second.fold(running, random_adapter(1), random_fisher(1))
    assert whole.report.raw_coefficient == second.report.raw_coefficient
    assert torch.equal(a.factors["one"].B, b.factors["one"].B)
