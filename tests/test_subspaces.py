"""What past tasks used, as bases and sketches, and the constraints that keep off it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pm_llm.adapters import lora_layers
from pm_llm.constraints import Context, Live
from pm_llm.constraints.gradient_subspace import GradientSubspace
from pm_llm.constraints.null_space import NullSpace
from pm_llm.inputs import second_moments
from pm_llm.subspace import Sketch, extended, extended_by_moments, without
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.invariants.step_script import make_trainer, weights


def test_a_basis_holds_its_share_and_no_more() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 3) @ torch.randn(3, 12) + 0.01 * torch.randn(40, 12)
    basis = extended(None, rows, 0.99, 12)
    assert basis.shape == (3, 12)
    more = extended(basis, torch.randn(5, 12), 1.0, 6)
    assert more.shape == (6, 12)  # never more than that
    torch.testing.assert_close(more @ more.T, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(without(basis, more), torch.zeros_like(basis), atol=1e-5, rtol=0)
    assert float(without(rows, basis).norm() ** 2) <= 0.01 * float(rows.norm() ** 2)
    assert torch.equal(extended(basis, rows, 0.99, 12), extended(basis, rows, 0.5, 12))  # it is held already
    for start in (None, basis):  # the same span from the second moments
        other = extended_by_moments(start, rows.T @ rows, 0.999, 12)
        same = extended(start, rows, 0.999, 12)
        torch.testing.assert_close(other.T @ other, same.T @ same, atol=1e-4, rtol=0)


def test_a_sketch_wider_than_its_rows_keeps_them_all() -> None:
    sketch, x = Sketch(20), torch.randn(90, 8)
    for part in x.split(3):
        sketch.add(part)
    torch.testing.assert_close(sketch.rows.T @ sketch.rows, x.T @ x, atol=1e-3, rtol=1e-3)


def test_frequent_directions_keeps_its_bound() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 10) * torch.tensor([10.0, 5, 3, 1, 1, 0.5, 0.5, 0.1, 0.1, 0.1])
    sketch = Sketch(5)
    for part in x.split(7):
        sketch.add(part)
    assert len(sketch.rows) <= 10
    error = torch.linalg.matrix_norm(x.T @ x - sketch.rows.T @ sketch.rows, 2)
    tails = torch.linalg.svdvals(x).square()
    for k in range(5):
        assert error <= tails[k:].sum() / (5 - k) + 1e-2


def context_for(family: str, task: int) -> tuple[Context, list[dict[str, torch.Tensor]]]:
    model = make_peft(family)
    rows = [batch_of(family, [row]) for row in features(family, 4, ("sentiment", "question")[task - 1])]
    chosen = SimpleNamespace(one_by_one=lambda _: iter(rows))
    return Context(task, live=Live(lora_layers(model), "default"), model=model, chosen=chosen), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_null_space_gives_past_inputs_nothing(family: str, tmp_path) -> None:
    first, rows = context_for(family, 1)
    null = NullSpace(share=1.0, most=0.7)
    null.prepare(first)
    null.remember(first)
    second, _ = context_for(family, 2)
    again = NullSpace(share=1.0, most=0.7)
    again.load_memory(null.memory())
    again.prepare(second)
    for name, basis in again.bases.items():
        a, _ = second.live.weights(name)
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
        assert (a @ basis.T).abs().max() < 1e-5
        assert len(basis) <= 0.7 * a.shape[1]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in first.live.layers}
    for name, layer in first.live.layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].detach().flatten(0, -2)))
    first.model.eval()
    with torch.no_grad():
        for row in rows:
            first.model(**row)
    for name, moments in second_moments(first.model, first.live.layers, first.chosen).items():
        x = torch.cat(inputs[name])[: len(torch.cat(inputs[name])) // 2]
        torch.testing.assert_close(moments, x.T @ x, atol=1e-3, rtol=1e-3)


def test_null_space_trains_b_alone(tmp_path) -> None:
    context, _ = context_for("llama", 1)
    null = NullSpace()
    trainer = make_trainer("llama", str(tmp_path), 16, 1, null, model=context.model, max_steps=3)
    null.prepare(context)
    before = weights(context.model)
    trainer.train()
    after = weights(context.model)
    for name, x in before.items():
        assert torch.equal(after[name], x) == ("lora_A" in name)


def test_gradient_subspace_keeps_a_off_what_was_learned(tmp_path) -> None:
    first = GradientSubspace(share=0.9)
    trainer = make_trainer("llama", str(tmp_path), 16, 1, first, max_steps=4)
    context = Context(1, live=trainer.live)
    first.prepare(context)
    trainer.train()
    first.remember(context)
    assert all(0 < len(basis) <= 0.8 * 32 for basis in first.bases.values())
    second = GradientSubspace()
    second.load_memory(first.memory())
    trainer = make_trainer("llama", str(tmp_path), 16, 1, second, max_steps=3, optim="adamw_torch", learning_rate=1e-2)
    second.prepare(Context(2, live=trainer.live))
    started = weights(trainer.model)
    trainer.train()
    for name, basis in second.bases.items():
        a, _ = trainer.live.weights(name)
        assert (a @ basis.T).abs().max() < 1e-5
    assert any(not torch.equal(x, started[name]) for name, x in weights(trainer.model).items() if "lora_A" in name)
