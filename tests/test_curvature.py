"""The past tasks' quadratic as a penalty: in the step, through the Trainer, and in whole runs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pm_llm import Merger, Perturb
from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Constraint, Context
from pm_llm.constraints.curvature import Curvature
from pm_llm.errors import PmLlmError
from pm_llm.fisher.measure import sum_fisher
from pm_llm.sequence import ContinualSequence
from pm_llm.training.constrained import ConstraintMixin
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.helpers.runs import config_for
from tests.helpers.step_script import make_trainer, one_step
from tests.helpers.stops import stopping
from tests.invariants.test_step import assert_same


def after_one_task(family: str, form: str, scale: float = 1.0) -> tuple[Adapter, Merger]:
    model = make_peft(family, seed=5, random_b=True)
    rows = [batch_of(family, features(family, 6, "sentiment"))]
    fisher = sum_fisher(model, rows, form).mean()
    fisher = type(fisher)({name: f.divided(1 / scale) for name, f in fisher.modules.items()})
    merger = Merger("optimal")
    return merger.fold(None, Adapter.from_model(model, "default"), fisher), merger


def constraint(family: str, form: str = "factored", weight: float = 1.0, scale: float = 1.0) -> Curvature:
    running, merger = after_one_task(family, form, scale)
    found = Curvature(weight)
    found.prepare(Context(2, running.factors, merger.rule))
    return found


@pytest.mark.parametrize("form", ["dense", "factored", "kronecker"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_the_step_is_that_of_loss_and_penalty(family: str, form: str, tmp_path) -> None:
    _, plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    trainer = make_trainer(family, str(tmp_path), 16, 1, constraint(family, form, 0.5, 50.0))
    start = Adapter.from_model(trainer.model, "default")
    scaling = 2.0  # alpha 8 / r 4
    _, found = one_step(trainer)
    live = {}
    for name, x in start.factors.items():
        live[name] = LowRank((x.B / scaling).requires_grad_(True), x.A.clone().requires_grad_(True))
    penalty = trainer.constraints[0].penalty({n: LowRank(x.B * scaling, x.A) for n, x in live.items()})
    penalty.backward()
    assert penalty.item() > 1e-3
    expected = dict(plain)
    for name, x in live.items():
        for side in ("A", "B"):
            (key,) = (k for k in plain if f"{name}.lora_{side}." in k)
            expected[key] = plain[key] + getattr(x, side).grad
    assert_same(found, expected, atol=1e-5, rtol=1e-3)
    assert any((found[k] - plain[k]).abs().max() > 1e-3 for k in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_sign_change_nothing_of_the_penalty(family: str, tmp_path) -> None:
    """Law 4 with a penalty; it is of the update without the perturbation's scale."""
    whole = one_step(make_trainer(family, str(tmp_path), 16, 1, constraint(family, scale=50.0)))
    parts = one_step(make_trainer(family, str(tmp_path), 4, 4, constraint(family, scale=50.0)))
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)
    assert_same(whole[1], parts[1], atol=1e-5, rtol=1e-3)
    perturb = Perturb(epsilon=0.5, probability=0.5)
    with_it = one_step(make_trainer(family, str(tmp_path), 16, 1, [perturb, constraint(family, scale=50.0)]))
    without = one_step(make_trainer(family, str(tmp_path), 16, 1, perturb))
    plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    for name in plain[1]:
        added, expected = with_it[1][name] - without[1][name], whole[1][name] - plain[1][name]
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_observed_loss_is_without_the_penalty(family: str, accumulation: int, tmp_path) -> None:
    class Seen(Constraint):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def observe(self, step, loss) -> None:
            self.losses.append(loss.item())

    alone, beside = Seen(), Seen()
    make_trainer(family, str(tmp_path), 16 // accumulation, accumulation, alone).train()
    both = [beside, constraint(family, scale=50.0)]
    make_trainer(family, str(tmp_path), 16 // accumulation, accumulation, both).train()
    assert beside.losses == pytest.approx(alone.losses, rel=1e-4)


def test_loss_of_a_model_that_counts_no_tokens_gets_the_same_penalty(tmp_path) -> None:
    """Then the Trainer itself divides by the number of passes."""
    found = []
    for batch, accumulation in ((16, 1), (4, 4)):
        trainer = make_trainer(
            "llama", str(tmp_path), batch, accumulation, constraint("llama", weight=2.0, scale=50.0)
        )
        plain = make_trainer("llama", str(tmp_path), batch, accumulation)
        for one in (trainer, plain):
            one.model_accepts_loss_kwargs = False
        with_it, without = one_step(trainer)[1], one_step(plain)[1]
        found.append({name: with_it[name] - without[name] for name in with_it})
    assert_same(found[0], found[1], atol=1e-5, rtol=1e-3)
    assert any(x.abs().max() > 1e-3 for x in found[0].values())


def test_evaluation_has_no_penalty(tmp_path) -> None:
    trainer = make_trainer("llama", str(tmp_path), 4, 1, constraint("llama", scale=1e6), eval_strategy="no")
    trainer.model.eval()
    batch = batch_of("llama", features("llama", 4))
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(
        trainer.model(**batch).loss.item(), rel=1e-5
    )


def test_first_task_and_weight_zero_have_no_penalty() -> None:
    _, merger = after_one_task("llama", "factored")
    first = Curvature()
    first.prepare(Context(1, {}, Merger("optimal").rule))
    assert first.penalty({}) is None
    none = Curvature(weight=0.0)
    none.prepare(Context(2, after_one_task("llama", "factored")[0].factors, merger.rule))
    assert none.penalty({}) is None
    with pytest.raises(PmLlmError, match="merge optimal"):
        Curvature().prepare(Context(1, {}, Merger("average").rule))


@pytest.mark.parametrize("space", ["weights", "factors"])
@pytest.mark.parametrize("form", ["dense", "factored", "kronecker"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_penalty_less_is_taken_back(family: str, form: str, space: str, pico_folders, tmp_path) -> None:
    if space == "factors" and form != "factored":
        pytest.skip("the space of factors has a form of its own")
    found = {}
    strong = 30.0 if form == "kronecker" else 1.0  # at 1 it moves the coefficient by less than a thousandth
    for weight in (0.0, strong):
        constrain = [{"name": "perturb", "epsilon": 0.2}, {"name": "curvature", "weight": weight}]
        config = config_for(
            pico_folders[family],
            tmp_path / str(weight),
            **{"constrain": constrain, "fisher.form": form, "space": space, "train.max_steps": 8},
            **{"train.learning_rate": 0.02, "evaluate": "final"},
        )
        results = ContinualSequence(config).run()
        found[weight] = results["raw_coefficients"]
        assert [word["name"] for word in results["method"]["constrain"]] == ["perturb", "curvature"]
    assert found[0.0][0] == found[strong][0] == 1.0  # the first task is the same run
    assert found[strong][1] > found[0.0][1]


VARIANTS = {
    "factored": {
        "fisher.form": "factored",
        "truncation": "fisher",
        "merge": {"name": "optimal", "fisher_scale": "measured", "current": "exact", "rank": 5, "pairs": 1},
        "constrain": ["perturb", "curvature"],
        "max_rank": 6,
    },
    "kronecker": {"fisher.form": "kronecker", "merge": {"name": "optimal", "current": "line"}},
    "factors": {"space": "factors", "merge": {"name": "optimal", "fisher_scale": "measured", "current": "exact"}},
}


@pytest.mark.parametrize(
    ("family", "variant", "where"),
    [("llama", variant, where) for variant in VARIANTS for where in ("train", "step", "measure")]
    + [("t5", variant, "step") for variant in VARIANTS],
)
def test_going_on_and_restarting_change_nothing(
    family: str, variant: str, where: str, pico_folders, tmp_path, monkeypatch
) -> None:
    from safetensors.torch import load_file

    def run(name: str, **options):
        keys = {**VARIANTS[variant], "train.save_steps": 2, "evaluate": "final"}
        sequence = ContinualSequence(config_for(pico_folders[family], tmp_path / name, **keys), **options)
        return sequence, tmp_path / name / "adapter/adapter_model.safetensors"

    sequence, file = run("whole")
    whole, expected = sequence.run(), load_file(file)
    sequence, file = run("parts")
    original = ConstraintMixin.training_step

    def interrupted(trainer, *rest):  # the third step of the third task, after its checkpoint
        if trainer.state.global_step == 2 and sequence.session.merger.tasks == 2:
            raise KeyboardInterrupt
        return original(trainer, *rest)

    if where == "step":
        monkeypatch.setattr(ConstraintMixin, "training_step", interrupted)
    with nullcontext() if where == "step" else stopping(where, 3), pytest.raises(KeyboardInterrupt):
        sequence.run()
    monkeypatch.undo()
    assert bool(list((tmp_path / "parts").glob("work/03-question/checkpoint-*"))) == (where != "train")
    for options in ({}, {"restart_from": "question"}):
        sequence, file = run("parts", **options)
        resumed = sequence.run()
        assert resumed["matrix"] == whole["matrix"]
        for key in ("raw_coefficients", "truncation_errors", "curvature_errors", "losses", "exact_curvatures"):
            assert resumed[key] == whole[key]
        assert all(torch.equal(x, expected[name]) for name, x in load_file(file).items())


def test_a_constraint_that_is_set_later_is_in_the_step_too(tmp_path) -> None:
    """As the benchmark of the step sets them, from step to step."""
    given = one_step(make_trainer("llama", str(tmp_path), 16, 1, constraint("llama", scale=50.0)))
    later = make_trainer("llama", str(tmp_path), 16, 1)
    later.constraints = [constraint("llama", scale=50.0)]
    found = one_step(later)
    assert found[0] == pytest.approx(given[0], rel=1e-6)
    assert_same(found[1], given[1], atol=1e-6, rtol=1e-4)
