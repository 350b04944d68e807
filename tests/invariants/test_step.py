"""Law 4: a step does not depend on how its batch is split. Law 5: epsilon 0 is nothing, and scales are put back."""

from __future__ import annotations

import pytest
import torch
from trl.trainer import utils as trl_utils

from pm_llm import Perturb
from pm_llm.adapters.live import lora_layers, set_active
from pm_llm.constraints.anchor import Anchor
from pm_llm.constraints.base import Constraint
from tests.conftest import FAMILIES
from tests.helpers.launching import launch, launcher
from tests.helpers.step_script import ALWAYS, KINDS_OF_ROWS, UNEVEN, make_trainer, one_step, weights


class Watching(Constraint):
    """Always one scale; keeps the losses it observes."""

    def __init__(self, factor: float, seen: list) -> None:
        self.factor, self.seen = factor, seen

    def scale(self, step) -> float:
        return self.factor

    def observe(self, step, loss) -> None:
        self.seen.append(loss)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS_OF_ROWS])
def test_accumulation_changes_nothing(family: str, tmp_path) -> None:
    whole = one_step(make_trainer(family, str(tmp_path), 16, 1, Perturb(**ALWAYS)))
    parts = one_step(make_trainer(family, str(tmp_path), 4, 4, Perturb(**ALWAYS)))
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)
    assert_same(whole[1], parts[1], atol=1e-6, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in whole[1].values())


@pytest.mark.slow
def test_two_processes_change_nothing(forker, tmp_path) -> None:
    """Nor where the last step has rows for one of them only."""
    command = launcher("ddp_cpu", tmp_path, "tests/helpers/step_script.py")
    ended = launch(forker, [*command, str(tmp_path), "8", "1"], kill=300.0)
    assert ended.status == 0, ended.said
    for kind in KINDS_OF_ROWS:
        for options, (loss, gradient) in zip(({}, UNEVEN), torch.load(tmp_path / f"{kind}.pt"), strict=True):
            whole = one_step(make_trainer(kind, str(tmp_path), 16, 1, Perturb(**ALWAYS), **options))
            assert whole[0] == pytest.approx(loss, rel=1e-4)
            assert_same(whole[1], gradient, atol=1e-6, rtol=1e-4)
    for family in FAMILIES:
        perturb, (*done, (through, resumed)) = Perturb(**ALWAYS), torch.load(tmp_path / f"{family}.pt")
        assert_same(through, resumed, atol=1e-7, rtol=1e-6)  # stopped within the epoch and gone on with
        alone = ((perturb, {}), (perturb, UNEVEN), (Anchor(5.0), UNEVEN))
        for (constraint, options), (loss, gradient) in zip(alone, done, strict=True):
            whole = one_step(make_trainer(family, str(tmp_path), 16, 1, constraint, **options))
            assert whole[0] == pytest.approx(loss, rel=1e-4)
            assert_same(whole[1], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_epsilon_zero_is_the_plain_trainer_bit_for_bit(family: str, tmp_path) -> None:
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    ours = make_trainer(family, str(tmp_path), 4, 1, Perturb(epsilon=0.0), **options)
    ours.train()
    plain = make_trainer(family, str(tmp_path), 4, 1, plain=True, **options)
    plain.train()
    assert_same(weights(ours.model), weights(plain.model), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_perturbation_does_something(family: str, tmp_path) -> None:
    _, plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    _, perturbed = one_step(make_trainer(family, str(tmp_path), 16, 1, Perturb(**ALWAYS)))
    assert any((plain[name] - perturbed[name]).abs().max() > 1e-4 for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradient(family: str, tmp_path) -> None:
    without = one_step(make_trainer(family, str(tmp_path), 16, 1, Perturb(**ALWAYS)))
    options = {"gradient_checkpointing": True}
    with_it = one_step(make_trainer(family, str(tmp_path), 16, 1, Perturb(**ALWAYS), **options))
    assert_same(without[1], with_it[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_curvature_is_logged(family: str, tmp_path) -> None:
    trainer = make_trainer(family, str(tmp_path), 4, 2, Perturb(), max_steps=12, learning_rate=1e-3)
    trainer.train()
    values = [log["curvature"] for log in trainer.state.log_history if "curvature" in log]
    assert len(values) >= 3
    assert all(torch.isfinite(torch.tensor(v)) for v in values)


def test_observed_loss_does_not_depend_on_the_split(tmp_path) -> None:
    means = []
    for batch, accumulation in ((16, 1), (4, 4)):
        seen = []
        constraint = Watching(1.0, seen)
        trainer = make_trainer("t5", str(tmp_path), batch, accumulation)
        trainer.constraints = [constraint]
        trainer.train()
        means.append(float(torch.stack(seen).mean()))
    assert means[0] == pytest.approx(means[1], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_with_a_frozen_running_adapter(family: str, tmp_path) -> None:
    """Transformers comes back with the first adapter alone active, and trainable."""
    from tests.invariants.test_identity import two_adapters

    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}

    def trainer(steps: int):
        model, _ = two_adapters(family, "plain")
        set_active(model, ["running", "new"], trainable="new")
        return make_trainer(family, str(tmp_path), 4, 1, Perturb(**ALWAYS), model=model, max_steps=steps, **options)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    running = {n: p.detach().clone() for n, p in resumed.model.named_parameters() if ".running." in n}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.model.active_adapters == ["running", "new"]
    assert_same(running, {n: p for n, p in resumed.model.named_parameters() if ".running." in n}, atol=0, rtol=0)
    assert_same(weights(whole.model), weights(resumed.model), atol=1e-6, rtol=1e-5)


def scalings(model) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in lora_layers(model).values()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_is_put_back(family: str, checkpointing: bool, tmp_path) -> None:
    trainer = make_trainer(family, str(tmp_path), 4, 2, Perturb(**ALWAYS), gradient_checkpointing=checkpointing)
    before = scalings(trainer.model)
    trainer.train()
    assert scalings(trainer.model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_is_put_back_when_the_step_raises(family: str, tmp_path) -> None:
    trainer = make_trainer(family, str(tmp_path), 4, 1, Perturb(**ALWAYS))
    before = scalings(trainer.model)
    seen = []

    def explode(*args, **kwargs):
        seen.append(scalings(trainer.model))
        raise RuntimeError("boom")

    trainer.accelerator.backward = explode
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train()
    assert seen[0] != before
    assert scalings(trainer.model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_trainable_adapter_is_scaled(family: str, tmp_path) -> None:
    from pm_llm.adapters.live import set_active
    from tests.invariants.test_identity import two_adapters

    model, _ = two_adapters(family, "plain")
    set_active(model, ["running", "new"], trainable="new")
    trainer = make_trainer(family, str(tmp_path), 4, 1, Perturb(**ALWAYS), model=model)
    before, seen = scalings(model), []
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kw: (seen.append(scalings(model)), backward(loss, **kw))
    trainer.train()
    for was, now in zip(before, seen[0], strict=True):
        assert now["running"] == was["running"]
        assert abs(now["new"] / was["new"] - 1) == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_over_signs_is_the_gradient_of_the_mean_loss(family: str, tmp_path) -> None:
    """p g(-) + (1 - 2p) g(0) + p g(+) against autograd of (1 - 2p) L0 + p (L+ + L-), written without `scaling`."""
    p, epsilon = 0.3, 0.5
    trainer = make_trainer(family, str(tmp_path), 16, 1)
    model = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    names = [name for name, q in model.named_parameters() if q.requires_grad]

    def step_gradient(sign: int) -> dict[str, torch.Tensor]:
        trainer.constraints = [Watching(1 + sign * epsilon, [])]
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1
        tokens = (batch["labels"][:, 1:] if family == "llama" else batch["labels"]).ne(-100).sum()
        trainer.training_step(model, dict(batch), tokens)
        return {name: q.grad.clone() for name, q in model.named_parameters() if q.requires_grad}

    mean = {name: torch.zeros_like(q) for name, q in model.named_parameters() if q.requires_grad}
    for sign, weight in ((-1, p), (0, 1 - 2 * p), (1, p)):
        for name, g in step_gradient(sign).items():
            mean[name] += weight * g

    def loss_at(factor: float) -> torch.Tensor:
        parameters = dict(model.named_parameters())
        moved = {name: q * factor for name, q in parameters.items() if "lora_B" in name}
        return torch.func.functional_call(model, moved, kwargs=dict(batch)).loss

    model.zero_grad()
    ((1 - 2 * p) * loss_at(1.0) + p * loss_at(1 + epsilon) + p * loss_at(1 - epsilon)).backward()
    expected = {name: q.grad for name, q in model.named_parameters() if q.requires_grad}
    assert set(names) == set(expected)
    assert_same(mean, expected, atol=1e-6, rtol=1e-4)


def test_the_head_scores_answers_only_and_nothing_else_changes(tmp_path, monkeypatch) -> None:
    """On CPU TRL's head scores every position; here those with a label, with the same loss and gradient."""
    scored: list[int] = []
    function = trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(len(hidden))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    ours = one_step(make_trainer("llama", str(tmp_path), 16, 1))
    plain = one_step(make_trainer("llama", str(tmp_path), 16, 1, plain=True))
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert_same(ours[1], plain[1], atol=1e-6, rtol=1e-4)
    rows = make_trainer("llama", str(tmp_path), 16, 1).train_dataset
    answers = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    assert scored == [answers, 16 * (max(len(row["labels"]) for row in rows) - 1)]
