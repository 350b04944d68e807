"""P&M in the space of the LoRA factors: perturbation, Fisher, coefficient and merge on A and B."""

from __future__ import annotations

import pytest
import torch

from pm_llm import Merger, Perturb
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import factors_of, lora_layers, stretched
from pm_llm.algebra.lowrank import LowRank
from pm_llm.config import load_config
from pm_llm.constraints.base import Step
from pm_llm.errors import PmLlmError
from pm_llm.families.base import family_of
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.measure import sum_fisher
from pm_llm.fisher.of_factors import Factors
from pm_llm.merges.base import Fold, Trained
from pm_llm.sequence import ContinualSequence
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.helpers.step_script import make_trainer, one_step, weights
from tests.invariants.test_closed_form import argmin, random_adapter
from tests.invariants.test_step import ALWAYS, assert_same


def random_fisher(seed: int, adapter: Adapter) -> Fisher:
    torch.manual_seed(seed)
    return Fisher({n: Factors(torch.rand_like(x.B), torch.rand_like(x.A)) for n, x in adapter.factors.items()})


def test_coefficient_is_the_brute_force_minimum_over_the_factors() -> None:
    merger, running, past = Merger("optimal", space="factors", clip=False), None, []
    for t in range(4):
        new = random_adapter(t)
        fisher = random_fisher(10 + t, new)
        past.append((fisher, new))

        def objective(alpha: float, running=running, new=new) -> float:
            total = 0.0
            for f, optimum in past:
                for n, x in new.factors.items():
                    for side in ("B", "A"):
                        before = getattr(running.factors[n], side) if running else 0.0
                        at = before + alpha * (getattr(x, side) - before)
                        gap = at - getattr(optimum.factors[n], side)
                        total += float((getattr(f.modules[n], side) * gap**2).sum()) / 2
            return total

        running = merger.fold(running, new, fisher, trained=Trained("base"))
        assert merger.report.raw_coefficient == pytest.approx(argmin(objective), abs=1e-4)
        assert merger.report.rank == new.rank  # it never grows
        assert merger.report.truncation_error == 0.0
    assert 0.05 < merger.report.raw_coefficient < 0.95


@pytest.mark.parametrize("current", ["diagonal", "exact"])
def test_first_task_vector_is_from_where_it_began(current: str) -> None:
    """Not from zero: A begins at random, and only its change is the task's."""
    model = make_peft("llama")
    start = Adapter.from_model(model, "default")
    generator = torch.Generator().manual_seed(0)
    for p in factors_of(lora_layers(model).values(), "default"):
        p.data += torch.randn(p.shape, generator=generator) / 20
    new = Adapter.from_model(model, "default")
    rule = Merger("optimal", space="factors", fisher_scale="own", current=current).rule
    direction = rule.direction(Fold(1, {}, new.factors, trained=Trained("base", began=start.factors)))
    batches = [batch_of("llama", features("llama", 4))]
    fisher = sum_fisher(model, batches, "factors", direction).mean()
    # by autograd: the derivative of each example's loss along (dB, dA) in the live factors
    model.eval()
    total = 0.0
    for row in features("llama", 4):
        loss, slope = family_of(model).loss(model, batch_of("llama", [row])), 0.0
        for name, layer in lora_layers(model).items():
            pair = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
            gb, ga = torch.autograd.grad(loss, pair, retain_graph=True)
            a, b = new.factors[name], start.factors[name]
            slope += float((gb * (a.B - b.B) / layer.scaling["default"]).sum() + (ga * (a.A - b.A)).sum())
        total += slope**2 / 4
    assert fisher.exact == pytest.approx(total, rel=1e-4)
    merger = Merger(rule)
    merger.fold(None, new, fisher, Trained(began=start.factors))
    if current == "exact":
        size = fisher.exact
    else:
        steps = {n: LowRank(x.B - start.factors[n].B, x.A - start.factors[n].A) for n, x in new.factors.items()}
        size = sum(f.inner(steps[n], steps[n]) for n, f in fisher.modules.items())
    for name, past in rule.past.items():
        torch.testing.assert_close(past.S.B, fisher.modules[name].B / size)
    with pytest.raises(PmLlmError, match="began="):
        Merger("optimal", space="factors", fisher_scale="own").fold(None, new, fisher)


def test_merge_is_of_the_factors_not_of_their_product() -> None:
    merger = Merger("optimal", space="factors")
    first, second = random_adapter(0), random_adapter(1)
    running = merger.fold(None, first, random_fisher(0, first))
    merged = merger.fold(running, second, random_fisher(1, second), trained=Trained("base"))
    a = merger.report.coefficient
    for n, x in merged.factors.items():
        torch.testing.assert_close(x.B, (1 - a) * first.factors[n].B + a * second.factors[n].B)
        torch.testing.assert_close(x.A, (1 - a) * first.factors[n].A + a * second.factors[n].A)


def test_another_rank_or_a_fresh_adapter_is_refused() -> None:
    merger, first = Merger("optimal", space="factors"), random_adapter(0)
    running = merger.fold(None, first, random_fisher(0, first))
    wider = Adapter({n: LowRank(torch.randn(6, 3), torch.randn(3, 5)) for n in first.factors}, first.place)
    with pytest.raises(PmLlmError, match="one rank"):
        merger.fold(running, wider, random_fisher(1, wider), trained=Trained("base"))
    with pytest.raises(PmLlmError, match="must continue"):
        merger.fold(running, random_adapter(1), random_fisher(1, first))


def test_stretched_is_undone_exactly_also_after_an_error() -> None:
    model = make_peft("llama", random_b=True)
    layers = list(lora_layers(model).values())
    parameters = factors_of(layers, "default")
    origin = [torch.randn_like(p) for p in parameters]
    before = [p.detach().clone() for p in parameters]

    def fails() -> None:
        with stretched(layers, "default", origin, 1.5):
            for p, o, was in zip(parameters, origin, before, strict=True):
                torch.testing.assert_close(p.data, o + 1.5 * (was - o))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))
    assert all(not p._backward_hooks for p in parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_perturbed_loss(family: str) -> None:
    """d/dtheta L(o + f (theta - o)), by autograd on the expression itself."""
    model = make_peft(family, random_b=True).eval()
    layers, factor = list(lora_layers(model).values()), 0.5
    parameters = factors_of(layers, "default")
    origin = [torch.randn_like(p) / 10 for p in parameters]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == len(parameters)
    by_id = {id(p): name for name, p in model.named_parameters()}
    batch = batch_of(family, features(family, 4))
    with stretched(layers, "default", origin, factor):
        model(**batch).loss.backward()
    moved = {by_id[id(p)]: o + factor * (p - o) for p, o in zip(parameters, origin, strict=True)}
    loss = torch.func.functional_call(model, moved, kwargs=batch).loss
    expected = torch.autograd.grad(loss, parameters)
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)
    assert max(g.abs().max() for g in expected) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_of_the_step_hold(family: str, tmp_path) -> None:
    """Laws 4 and 5: the split of a batch changes nothing, epsilon 0 is the plain Trainer, all is put back."""

    def moved(batch: int, accumulation: int, perturb: Perturb, **options):
        trainer = make_trainer(family, str(tmp_path), batch, accumulation, perturb, **options)
        torch.manual_seed(5)
        trainer._origin = [p.detach() + torch.randn_like(p) / 10 for p in trainer._origin]  # as if it had moved
        return one_step(trainer)

    whole = moved(16, 1, Perturb(**ALWAYS, space="factors"))
    parts = moved(4, 4, Perturb(**ALWAYS, space="factors"))
    checkpointed = moved(16, 1, Perturb(**ALWAYS, space="factors"), gradient_checkpointing=True)
    plain = moved(16, 1, Perturb(epsilon=0, space="factors"))
    assert_same(whole[1], parts[1], atol=1e-6, rtol=1e-4)
    assert_same(whole[1], checkpointed[1], atol=1e-6, rtol=1e-4)
    assert any((whole[1][name] - plain[1][name]).abs().max() > 1e-4 for name in plain[1])
    options = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    ours = make_trainer(family, str(tmp_path), 4, 1, Perturb(epsilon=0.0, space="factors"), **options)
    ours.train()
    without = make_trainer(family, str(tmp_path), 4, 1, plain=True, **options)
    without.train()
    assert_same(weights(ours.model), weights(without.model), atol=0, rtol=0)


def test_scale_is_as_in_the_space_of_weights() -> None:
    steps = [Step(seed=0, step=i) for i in range(30)]
    assert [Perturb(space="factors").scale(s) for s in steps] == [Perturb().scale(s) for s in steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_in_factors_keeps_rank_and_state(family: str, tmp_path, pico_folders) -> None:
    keys = {"method": "pm", "model": pico_folders[family], "benchmark": "embedded"}
    keys |= {"order": "sentiment,topic,question,puzzle"}
    keys |= {"max_train_samples": 16, "max_test_samples": 4, "lora.r": 4, "train.max_steps": 3, "fisher.samples": 6}
    keys |= {"train.learning_rate": 1e-2, "space": "factors", "output_dir": str(tmp_path / "run")}
    results = ContinualSequence(load_config(None, keys)).run()
    assert results["ranks"] == [4, 4, 4, 4]
    assert results["method"]["start"] == "continue"
    assert results["method"]["merge"] == {"name": "optimal", "space": "factors"}
    assert all(0 < a < 1 for a in results["raw_coefficients"][1:])
    sizes = {p.stat().st_size for p in (tmp_path / "run").glob("stages/*/adapter/adapter_model.safetensors")}
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"space": "factors", "start": "fresh"}, "start continue"),
        ({"merge": {"name": "optimal", "space": "factors"}}, "needs a start that continues"),
        ({"constrain": {"name": "perturb", "space": "factors"}}, "or neither"),
        ({"start": "continue"}, "would perturb the past tasks too"),
        ({"space": "factors", "method": "average"}, "needs merge optimal"),
        ({"space": "factors", "merge": {"name": "optimal", "space": "weights"}}, "needs merge optimal"),
        ({"space": "factors", "constrain": {"name": "perturb", "space": "weights"}}, "or neither"),
        ({"start": "continue", "constrain": {"name": "perturb", "space": "factors"}}, "or neither"),
        ({"space": "factors", "max_rank": 4}, "max_rank is 4"),
        ({"space": "factors", "truncation": "fisher"}, "truncation fisher"),
        ({"method": "seqlora", "truncation": "fisher"}, "truncation fisher"),
        ({"constrain": "curvature", "merge": "average"}, "merge optimal"),
        ({"constrain": "curvature", "start": "continue"}, "needs a start that is fresh"),
        ({"constrain": "curvature", "start": "alone"}, "start 'alone' leaves that out"),
        ({"constrain": {"name": "curvature", "weight": -1}}, "from 0"),
        ({"merge": {"name": "optimal", "rank": 0}}, "from 1"),
        ({"merge": {"name": "optimal", "current": "both"}}, "diagonal or exact"),
        ({"constrain": {"name": "perturb", "space": "both"}}, "weights or factors"),
        ({"fisher.form": "sparse"}, "dense or factored"),
        ({"fold_running": "yes"}, "auto or always or never"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict, expected: str) -> None:
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, {"method": "pm", **keys}).check()
