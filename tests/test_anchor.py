"""A term of the loss from a pass's own outputs and those of the network with the adapter off, in both families."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from pm_llm import ContinualSequence
from pm_llm.adapters.live import factors_of, lora_layers
from pm_llm.constraints.anchor import Anchor
from pm_llm.errors import PmLlmError
from pm_llm.methods import Method
from tests.conftest import FAMILIES, batch_of, features
from tests.helpers.runs import config_for
from tests.helpers.step_script import make_trainer, one_step
from tests.invariants.test_step import assert_same


def at_answers(logits: Tensor, labels: Tensor, family: str) -> Tensor:
    """Every model's logits, those that say an answer's token."""
    if family == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100].double()


def divergence(model, family: str, batch: dict, temperature: float) -> Tensor:
    """The sum over answer tokens of KL(model without its adapter || model), written with torch's own function."""
    with torch.no_grad(), model.disable_adapter():
        before = at_answers(model(**batch).logits, batch["labels"], family)
    after = at_answers(model(**batch).logits, batch["labels"], family)
    p, q = ((x / temperature).softmax(-1) for x in (before, after))
    return torch.nn.functional.kl_div(q.log(), p, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_divergence(family: str, tmp_path) -> None:
    """What the constraint adds to a step, against autograd on whole logits and against finite differences."""
    weight, temperature = 3.0, 2.0
    plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    trainer = make_trainer(family, str(tmp_path), 16, 1, Anchor(weight, temperature))
    model = trainer.model
    batch = dict(trainer.data_collator(list(trainer.train_dataset)))
    tokens = int((batch["labels"] != -100).sum())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean = weight * temperature**2 * divergence(model.eval(), family, batch, temperature) / tokens
    expected = dict(zip(parameters, torch.autograd.grad(mean, [*parameters.values()]), strict=True))
    loss, gradient = one_step(trainer)
    assert loss == pytest.approx(plain[0] + mean.item(), rel=1e-5)
    assert mean.item() > 1e-3
    assert_same({n: gradient[n] - plain[1][n] for n in gradient}, expected, atol=1e-6, rtol=1e-3)

    model.double()  # norms stay in float32, which bounds how fine the differences may be
    for name in list(expected)[:4]:
        now = weight * temperature**2 * divergence(model, family, batch, temperature) / tokens
        (exact,) = torch.autograd.grad(now, [parameters[name]])
        p, way, h, found = parameters[name].data.clone(), exact / exact.norm(), 1e-2, []
        for step in (h, -h):
            model.load_state_dict({name: p + step * way}, strict=False)
            with torch.no_grad():
                found.append(weight * temperature**2 * divergence(model, family, batch, temperature) / tokens)
        model.load_state_dict({name: p}, strict=False)
        assert ((found[0] - found[1]) / (2 * h)).item() == pytest.approx(exact.norm().item(), rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_however_a_step_is_split(family: str, tmp_path) -> None:
    whole = one_step(make_trainer(family, str(tmp_path), 16, 1, Anchor(5.0)))
    parts = one_step(make_trainer(family, str(tmp_path), 4, 4, Anchor(5.0)))
    again = one_step(make_trainer(family, str(tmp_path), 16, 1, Anchor(5.0), gradient_checkpointing=True))
    for other in (parts, again):
        assert whole[0] == pytest.approx(other[0], rel=1e-4)
        assert_same(whole[1], other[1], atol=1e-6, rtol=1e-4)
    nothing = one_step(make_trainer(family, str(tmp_path), 16, 1, Anchor(0.0)))
    plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    assert nothing[0] == plain[0]
    assert_same(nothing[1], plain[1], atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_leaves_nothing_behind(family: str, tmp_path) -> None:
    trainer = make_trainer(family, str(tmp_path), 4, 1, Anchor(5.0), max_steps=2)
    scalings = [dict(layer.scaling) for layer in lora_layers(trainer.model).values()]
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
    trainer.train()
    assert [dict(layer.scaling) for layer in lora_layers(trainer.model).values()] == scalings
    assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks
    assert trainer.model.training
    assert all(p.requires_grad for p in factors_of(lora_layers(trainer.model).values(), "default"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_moves_less_from_what_the_model_said(family: str, pico_folders, tmp_path) -> None:
    moved = {}
    for weight in (0.0, 50.0):
        keys = {"method": "inclora", "constrain": {"name": "anchor", "weight": weight}, "train.max_steps": 6}
        sequence = ContinualSequence(config_for(pico_folders[family], tmp_path / str(weight), **keys))
        results = sequence.run()
        model = sequence.session.model.eval()
        moved[weight] = divergence(model, family, batch_of(family, features(family, 8)), 1.0).item()
        assert json.loads((tmp_path / str(weight) / "results.json").read_text())["stages"] == results["stages"]
    assert moved[50.0] < 0.5 * moved[0.0]


def weights_of(reweight: str, q: Tensor, said: Tensor) -> Tensor:
    """Of each token, from all probabilities and the answer's."""
    if reweight == "dft":
        return said
    top = q.sort(descending=True).values[:, :20]
    top = top / top.sum(1, keepdim=True)
    return -(top * top.log()).sum(1) / 3


@pytest.mark.parametrize("reweight", ["dft", "eaft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reweighted_answers(family: str, reweight: str, tmp_path) -> None:
    """The loss and its gradient are those of the weighted mean over answer tokens."""
    trainer = make_trainer(family, str(tmp_path), 16, 1, Anchor(0.0, reweight=reweight))
    model = trainer.model
    batch = dict(trainer.data_collator(list(trainer.train_dataset)))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    for _ in range(
        60
    ):  # of unlikely answers the weighted loss is what is left of two numbers a thousand times as large
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    q = at_answers(model.eval()(**batch).logits, batch["labels"], family).softmax(-1)
    labels = batch["labels"][:, 1:] if family == "llama" else batch["labels"]
    said = q.gather(1, labels[labels != -100][:, None]).squeeze(1)
    mean = -(weights_of(reweight, q, said).detach() * said.log()).mean()
    expected = dict(zip(parameters, torch.autograd.grad(mean, [*parameters.values()]), strict=True))
    loss, gradient = one_step(trainer)
    assert loss == pytest.approx(mean.item(), rel=1e-4)
    assert_same(gradient, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_anchor_at_the_base(family: str, pico_folders, tmp_path) -> None:
    """With a running adapter the reference is that of the base alone; where nothing was learnt yet, both are one."""
    keys = {"method": "inclora", "train.max_steps": 4, "train.learning_rate": 1e-2}
    moved = {}
    for name, to in (("before", "before"), ("base", "base")):
        constrain = {"name": "anchor", "weight": 20.0, "to": to}
        sequence = ContinualSequence(config_for(pico_folders[family], tmp_path / name, constrain=constrain, **keys))
        stages = sequence.run()
        moved[name] = stages["shifts"]
    assert moved["before"][0] == moved["base"][0]  # the first task
    assert moved["base"][-1]["kl_from_base"] < moved["before"][-1]["kl_from_base"]
    keys |= {"constrain": constrain, "fold_running": "always"}
    with pytest.raises(PmLlmError, match="needs the base as it is"):
        config_for(pico_folders[family], tmp_path / "always", **keys).check()


def test_the_base_may_be_an_anchor_wherever_the_adapter_begins() -> None:
    Method().replaced(constrain={"name": "anchor", "to": "base"}, start="continue", merge="replace").check()


def test_it_needs_the_model_before_the_task() -> None:
    for keys in ({"start": "continue", "merge": "replace"}, {"start": {"name": "subspace", "init": "pissa"}}):
        with pytest.raises(PmLlmError, match="constrain anchor"):
            Method().replaced(**{"constrain": "anchor", "merge": "sum", **keys}).check()
    with pytest.raises(PmLlmError, match="temperature is 0"):
        Method().replaced(constrain={"name": "anchor", "temperature": 0.0}).check()


def test_it_takes_the_pass_that_is_trained(tmp_path) -> None:
    """With label smoothing TRL makes a second one, without gradient, for its numbers."""
    found = [
        one_step(make_trainer("llama", str(tmp_path), 16, 1, constraint, label_smoothing_factor=0.1))[1]
        for constraint in ((), Anchor(5.0))
    ]
    assert any((found[0][name] - found[1][name]).abs().max() > 1e-4 for name in found[0])
