"""What past tasks used, as bases and sketches, and the constraints that keep off it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.bases import Sketch, extended, extended_by_moments, without
from pm_llm.config import load_config
from pm_llm.constraints.base import Context, Live
from pm_llm.constraints.gradient_subspace import GradientSubspace
from pm_llm.constraints.null_space import NullSpace
from pm_llm.constraints.osft import Osft, block_importance
from pm_llm.errors import PmLlmError
from pm_llm.fisher.inputs import second_moments
from tests.conftest import FAMILIES, KINDS, batch_of, features, make_model, make_peft
from tests.helpers.contexts import chosen_rows, context_for
from tests.helpers.step_script import make_trainer, weights


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


def trained_with_osft(family: str, folder: str, steps: int, **options) -> tuple[Osft, Context, dict]:
    """A trainer's model after some steps, not finished, and what each layer keeps of its singular directions."""
    torch.manual_seed(1)
    settings = {"model": make_peft(family), "max_steps": steps, "learning_rate": 1e-2, "optim": "adamw_torch"}
    trainer = make_trainer(family, folder, 16, 1, (), **settings)
    chosen, _ = chosen_rows(family)
    context = Context(1, live=trainer.live, model=trainer.model, chosen=chosen)
    osft = Osft(**options)
    osft.prepare(context)
    trainer.constraints = [osft]
    kept = {}
    for name, layer in osft._layers.items():
        u, s, vh = torch.linalg.svd(trainer.live.layers[name].get_base_layer().weight.detach().float())
        k = min(layer.in_features, layer.out_features) - len(layer.osf_svd_params["default"]["S_low"])
        kept[name] = (u[:, :k], s[:k], vh[:k])
    trainer.train()
    return osft, context, kept


@pytest.mark.parametrize("family", FAMILIES)
def test_osft_leaves_the_large_directions_alone(family: str, tmp_path) -> None:
    """What goes in along them comes out as before, though the optimizer is Adam; all the rest may move."""
    osft, context, kept = trained_with_osft(family, str(tmp_path), steps=3, rate=1.0, rank=1000)
    before = {name: layer.get_delta_weight("default").detach() for name, layer in osft._layers.items()}
    assert all(not context.live.weights(name)[1].any() for name in before)  # A and B were not trained
    originals = {name: layer.base_layer for name, layer in osft._layers.items()}
    batch = batch_of(family, features(family, 2))
    context.model.eval()
    with torch.no_grad():
        expected = context.model(**batch).logits
    assert osft.finish(context) == {"osft_error": pytest.approx(0.0, abs=1e-6)}
    with torch.no_grad():
        torch.testing.assert_close(context.model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    for name, (u, s, vh) in kept.items():
        layer = context.live.layers[name]
        assert layer.base_layer is originals[name]
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(delta, before[name], atol=1e-5, rtol=1e-4)
        assert delta.abs().max() > 1e-3
        assert (delta @ vh.T).abs().max() < 1e-4
        assert (u.T @ delta).abs().max() < 1e-4
        weight = layer.base_layer.weight.detach() + delta
        torch.testing.assert_close(weight @ vh.T, u * s, atol=1e-4, rtol=1e-3)


def test_osft_hands_on_the_best_adapter_of_its_rank(tmp_path) -> None:
    osft, context, _ = trained_with_osft("llama", str(tmp_path), steps=2, rank=3)
    deltas = {name: layer.get_delta_weight("default").detach().double() for name, layer in osft._layers.items()}
    error = osft.finish(context)["osft_error"]
    lost = sum(float(torch.linalg.svdvals(x)[3:].square().sum()) for x in deltas.values())
    assert error == pytest.approx((lost / sum(float(x.square().sum()) for x in deltas.values())) ** 0.5, rel=1e-3)
    assert 0.01 < error < 1
    for name, x in deltas.items():
        found = context.live.layers[name].get_delta_weight("default").double()
        assert torch.linalg.matrix_rank(found, rtol=1e-4) == 3
        assert float((found.detach() - x).square().sum()) == pytest.approx(
            float(torch.linalg.svdvals(x)[3:].square().sum()), rel=1e-2
        )
    assert not any("osf" in name for name, _ in context.model.named_parameters())


def test_osft_trains_on_what_it_hands_on_in_bfloat16(tmp_path) -> None:
    """Under autocast, too, where the products of U, S and V are rounded."""
    osft, *_ = trained_with_osft("llama", str(tmp_path), steps=1, rate=0.01)
    for name, layer in osft._layers.items():
        x = torch.randn(4, layer.in_features)
        exact = layer.get_delta_weight("default").detach().double()
        nothing = layer.base_layer
        layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        torch.nn.init.zeros_(layer.base_layer.weight)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = layer(x).double()
        layer.base_layer = nothing
        expected = x.double() @ exact.T
        assert (found - expected).norm() < 0.02 * expected.norm(), name


def test_osft_takes_modules_outside_of_blocks() -> None:
    model = make_peft("t5", target_modules=["q", "lm_head"])
    rows = [batch_of("t5", [row]) for row in features("t5", 2)]
    chosen = SimpleNamespace(one_by_one=lambda _: iter(rows), family=KINDS["t5"])
    osft = Osft()
    osft.prepare(Context(1, live=Live(lora_layers(model), "default"), model=model, chosen=chosen))
    head = next(layer for name, layer in osft._layers.items() if "lm_head" in name)
    small = min(head.in_features, head.out_features)
    assert small - len(head.osf_svd_params["default"]["S_low"]) == round(0.8 * small)


@pytest.mark.parametrize("family", FAMILIES)
def test_osft_keeps_more_where_a_block_changes_little(family: str, tmp_path) -> None:
    """The share follows the mean cosine of the block's states before and after it."""
    trainer = make_trainer(family, str(tmp_path), 16, 1, (), model=make_peft(family))
    chosen, rows = chosen_rows(family)
    context = Context(1, live=trainer.live, model=trainer.model, chosen=chosen)
    if family == "llama":
        stack, states = trainer.model.get_base_model().model, "hidden_states"
        names = [f"model.layers.{i}" for i in range(len(stack.layers))]
    else:
        states = "encoder_hidden_states"
        names = [f"encoder.block.{i}" for i in range(len(trainer.model.get_base_model().encoder.block))]
    cosines: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    trainer.model.eval()
    with torch.no_grad():
        for row in rows:
            seen = trainer.model(**row, output_hidden_states=True)[states]
            for i, name in enumerate(names[:-1]):  # the last state has been through the final norm
                x, y = seen[i][0], seen[i + 1][0]
                cosines[name] += list((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)))
    found = block_importance(context)
    for name in names[:-1]:
        assert found[name] == pytest.approx(float(torch.stack(cosines[name]).mean()), abs=1e-4)
    osft = Osft(minimum=0.2, target=0.6)
    osft.prepare(context)
    mean = sum(found.values()) / len(found)
    for name, layer in osft._layers.items():
        small = min(layer.in_features, layer.out_features)
        block = max((b for b in found if name.startswith(f"{b}.")), key=len)
        share = 0.2 + found[block] / mean * 0.4
        kept = small - len(layer.osf_svd_params["default"]["S_low"])
        assert kept == min(max(round(share * small), 1), small - 1)


def test_osft_refuses_company_and_four_bits() -> None:
    for keys, expected in (
        ({"constrain": ["osft", "perturb"]}, "trains no adapter, and perturb"),
        ({"load_in_4bit": True}, "cannot be in 4 bits"),
        ({"start": "continue"}, "a start that is fresh"),
        ({"start": "subspace"}, "begins at zero"),
        ({"constrain": ["osft", "osft"]}, "twice"),
    ):
        with pytest.raises(PmLlmError, match=expected):
            load_config(None, {"method": "osft", **keys}).check()
    assert load_config(None, {"method": "osft", "constrain": ["osft", "replay"]}).check()
    assert load_config(None, {"method": "osft", "merge": "optimal"}).check()


def test_blocks_that_no_row_passes_do_not_count() -> None:
    base = make_model("llama")
    names = {f"model.layers.{i}" for i in range(len(base.model.layers))}
    base.model.tower = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([copy.deepcopy(base.model.layers[0])])})
    wide = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    live = Live(dict(lora_layers(wide)), "default")
    found = block_importance(Context(1, live=live, model=wide, chosen=chosen_rows("llama")[0]))
    assert set(found) == names
