"""The factored Fisher, the Fisher of the factors, and the exact curvature, against autograd and dense algebra."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM, set_seed

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers, scaled, set_active
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.families.base import family_of
from pm_llm.fisher.base import Fisher, Layer, Room, form_of, past_of
from pm_llm.fisher.kronecker import Kronecker
from pm_llm.fisher.measure import sum_fisher, sum_loss
from pm_llm.fisher.of_factors import Factors
from pm_llm.fisher.row_column import Factored, FactoredPast
from pm_llm.fisher.scale import scale_of
from pm_llm.merges.base import Trained
from pm_llm.merges.merger import Merger
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.invariants.test_closed_form import argmin, random_adapter


def rows_of(family: str):
    return features(family, 3, "sentiment") + features(family, 3, "puzzle")


def batches_of(family: str, size: int):
    rows = rows_of(family)
    return [batch_of(family, rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_factored_has_the_sums_of_the_dense(family: str, batch_size: int, checkpointing: bool | None) -> None:
    model = make_peft(family, random_b=True)
    dense = sum_fisher(model, batches_of(family, 1)).modules
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    calls = []
    base = model.get_base_model()
    block = base.model.layers[0].self_attn if family == "llama" else base.encoder.block[0].layer[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = sum_fisher(model, batches_of(family, batch_size), "factored").modules
    handle.remove()
    batches = -(-6 // batch_size)
    assert len(calls) == (batches if checkpointing is None else 2 * batches)  # it did checkpoint
    assert set(found) == set(dense)
    for name, sums in found.items():
        F = dense[name]["F"]
        assert F.max() > 0
        torch.testing.assert_close(sums["r"], F.sum(1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(sums["c"], F.sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_adds_nothing(family: str) -> None:
    model, rows = make_peft(family, random_b=True), rows_of(family)
    batch = batch_of(family, rows)
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 7), value=3),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 7), value=0),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 7), value=-100),
    }
    narrow, padded = (sum_fisher(model, [b], "factored").modules for b in (batch, wide))
    for name, sums in narrow.items():
        torch.testing.assert_close(sums["r"], padded[name]["r"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(sums["c"], padded[name]["c"], rtol=1e-4, atol=1e-7)


def test_a_layer_called_twice_has_one_gradient() -> None:
    model = make_peft("llama", random_b=True)
    layers = model.get_base_model().model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    rows = rows_of("llama")
    found = sum_fisher(model, [batch_of("llama", rows)], "dense").modules["model.layers.0.self_attn.q_proj"]["F"]
    weight = layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    expected = torch.zeros_like(weight)
    for row in rows:
        expected += torch.autograd.grad(family_of(model).loss(model, batch_of("llama", [row])), [weight])[0] ** 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_call_that_the_loss_does_not_see_takes_nothing_away() -> None:
    model = make_peft("llama", random_b=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    batch = batch_of("llama", rows_of("llama"))
    expected = sum_fisher(model, [batch], "factored").modules

    def again(module, args, output) -> None:
        layer(args[0])

    model.get_base_model().model.layers[1].register_forward_hook(again)
    found = sum_fisher(model, [batch], "factored").modules
    for name, sums in expected.items():
        assert torch.equal(found[name]["r"], sums["r"])


def test_dropout_of_a_checkpointed_layer_is_off() -> None:
    """OPT's layers drop by themselves, and checkpoint in training mode only."""
    config = OPTConfig(
        **{"vocab_size": 1024, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"dropout": 0.5, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "word_embed_proj_dim": 32},
    )
    set_seed(0)
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    batches = batches_of("llama", 3)
    expected = sum_fisher(model, batches, "factored")
    model.gradient_checkpointing_enable()
    found = sum_fisher(model, batches, "factored")
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    for name, sums in expected.modules.items():
        torch.testing.assert_close(found.modules[name]["r"], sums["r"], rtol=1e-3, atol=1e-7)
    assert model.get_base_model().model.decoder.layers[0].dropout == 0.5


def test_no_matrix_of_the_weights_shape_is_made() -> None:
    """Adding an example at 7B's width and few tokens allocates nothing as large as d_out x d_in."""
    wide = 2048
    x, g = torch.randn(2, 6, wide), torch.randn(2, 6, wide)
    layer = Layer((wide, wide), LowRank(torch.zeros(wide, 1), torch.zeros(1, wide)))
    sums = Factored.blank(layer, torch.zeros)
    with torch.profiler.profile(profile_memory=True) as seen:
        Factored.add(sums, x, g, layer)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < wide * wide


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_of_the_factors_equals_autograd(family: str) -> None:
    model = make_peft(family, random_b=True).eval()
    found = sum_fisher(model, batches_of(family, 4), "factors").modules
    layers = lora_layers(model)
    expected = {name: [torch.zeros(()), torch.zeros(())] for name in layers}
    for row in rows_of(family):
        loss = family_of(model).loss(model, batch_of(family, [row]))
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            ga, gb = torch.autograd.grad(loss, [a, b], retain_graph=True)
            s = layer.scaling["default"]  # the pair is (s B, A)
            expected[name] = [expected[name][0] + (gb / s) ** 2, expected[name][1] + ga**2]
    for name, (b, a) in expected.items():
        torch.testing.assert_close(found[name]["B"], b, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[name]["A"], a, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["dense", "factored", "kronecker", "factors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_curvature_is_the_derivative_in_the_scale(family: str, form: str) -> None:
    """By autograd through `LoraLayer.scaling`, one example at a time."""
    model = make_peft(family, random_b=True).eval()
    new = Adapter.from_model(model, "default")
    slopes = []
    for row in rows_of(family):
        factor = torch.ones((), requires_grad=True)
        with scaled(lora_layers(model).values(), "default", factor):
            slopes.append(
                torch.autograd.grad(family_of(model).loss(model, batch_of(family, [row])), [factor])[0].item()
            )
    found = sum_fisher(model, batches_of(family, 4), form, direction=new.factors).mean()
    assert found.exact == pytest.approx(sum(s * s for s in slopes) / 6, rel=1e-4)
    assert set(found.exact_modules) == set(new.factors)
    assert min(found.exact_modules.values()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_the_pass(family: str) -> None:
    model = make_peft(family, random_b=True).eval()
    total, count = sum_loss(model, batches_of(family, 4))
    expected = 0.0
    for row in rows_of(family):
        batch = batch_of(family, [row])
        tokens = (batch["labels"] if family == "t5" else batch["labels"][:, 1:]).ne(-100).sum()
        expected += model(**batch).loss.item() * tokens.item()
    assert count == 6
    assert total == pytest.approx(expected, rel=1e-5)
    fisher = sum_fisher(model, batches_of(family, 3), "factored").mean(loss_before=7.0)
    assert fisher.losses == (7.0, pytest.approx(expected / 6, rel=1e-5))


def test_leaves_gradients_modes_and_hooks_alone() -> None:
    model = make_peft("llama", random_b=True, lora_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.get_base_model().model.layers[1].eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    wanting = [p.requires_grad for p in model.parameters()]
    sum_fisher(model, batches_of("llama", 3), "factored")
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_gives_the_sums_of_float32_nearly() -> None:
    model = make_peft("llama", random_b=True)
    whole = sum_fisher(model, batches_of("llama", 3), "factored").modules
    half = sum_fisher(model.to(torch.bfloat16), batches_of("llama", 3), "factored").modules
    for name, sums in whole.items():
        assert half[name]["r"].dtype == torch.float32
        assert half[name]["r"].sum().item() == pytest.approx(sums["r"].sum().item(), rel=0.1)


# ---- the algebra of past quadratics ----
def pair(seed: int, modules=("one", "two")) -> Fisher:
    torch.manual_seed(1000 + seed)
    found = {}
    for name in modules:
        r, c = torch.rand(6) ** 2, torch.rand(5) ** 2
        found[name] = Factored(r, c * (r.sum() / c.sum()))
    return Fisher(found)


def as_dense(fisher: Fisher) -> dict[str, torch.Tensor]:
    return {n: f.r[:, None] * f.c / f.r.sum() for n, f in fisher.modules.items()}


@pytest.mark.parametrize("granularity", ["model", "module"])
@pytest.mark.parametrize("scale", ["raw", "trace", "own"])
def test_factored_is_dense_where_the_fisher_is_of_rank_one(scale: str, granularity: str) -> None:
    factored = Merger("optimal", granularity=granularity, fisher_scale=scale, clip=False)
    dense = Merger("optimal", granularity=granularity, fisher_scale=scale, clip=False)
    a = b = None
    for t in range(4):  # as many as there are pairs
        a = factored.fold(a, random_adapter(t), pair(t))
        b = dense.fold(b, random_adapter(t), as_dense(pair(t)))
        for name, value in dense.report.raw_coefficients.items():
            assert factored.report.raw_coefficients[name] == pytest.approx(value, rel=1e-4)
    assert factored.report.curvature_errors == {"own": pytest.approx(0.0, abs=1e-5), "slope": 0.0}
    assert 0.05 < factored.report.raw_coefficient < 0.95


@pytest.mark.parametrize("form", ["dense", "factored", "factors"])
def test_equal_fishers_give_one_over_t(form: str) -> None:
    def fisher(adapter: Adapter) -> Fisher:
        if form == "factors":
            torch.manual_seed(7)
            return Fisher({n: Factors(torch.rand_like(x.B), torch.rand_like(x.A)) for n, x in adapter.factors.items()})
        return pair(0) if form == "factored" else Fisher.of(as_dense(pair(0)))

    merger, running = Merger("optimal", space="factors" if form == "factors" else "weights"), None
    for t in range(1, 12):  # more than there are pairs: joining equal ones costs nothing
        new = random_adapter(t)
        running = merger.fold(running, new, fisher(new), trained=Trained("base" if form == "factors" else "running"))
        assert merger.report.raw_coefficient == pytest.approx(1 / t, rel=1e-4)
        assert merger.report.curvature_errors["own"] < 1e-3


@pytest.mark.parametrize("form", ["factored", "kronecker"])
def test_joining_in_a_fold_keeps_the_slope_at_the_merged_model(form: str) -> None:
    """There the next task begins; not right after training, where the model is no more."""

    def fisher(t: int) -> Fisher:
        sums = pair(t)
        if form == "factored":
            return sums
        return Fisher({name: Kronecker(f.r.diag(), f.c.diag()) for name, f in sums.modules.items()})

    few, many = (Merger("optimal", form=form, pairs=pairs, rank=100) for pairs in (3, 10))
    running = None
    for t in range(4):  # the fourth is the first that joins
        both = [merger.fold(running, random_adapter(t), fisher(t)) for merger in (few, many)]
        running = both[0]
    assert 0.1 < few.report.raw_coefficient < 0.9
    assert few.report.curvature_errors["own"] > 1e-3
    for name, past in few.rule.past.items():
        delta = random_adapter(9).factors[name]
        expected = many.rule.past[name].pull(running.factors[name], delta)
        assert past.pull(running.factors[name], delta) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_cut_of_the_slope_bounds_the_error_of_the_coefficient() -> None:
    """|<g - g_cut, Delta>|^2 <= (what was cut, weighted) * (<S o Delta, Delta> with S's row and column sums)."""
    torch.manual_seed(0)
    past, at = None, LowRank(torch.randn(40, 6), torch.randn(6, 30))
    for _ in range(4):
        exact = past.g if past is not None else None
        theta = LowRank(torch.randn(40, 6), torch.randn(6, 30))
        r, c = torch.rand(40) ** 3 + 1e-3, torch.rand(30) ** 3 + 1e-3
        fisher = Factored(r, c * (r.sum() / c.sum()))
        g = fisher.times(lowrank.add(at, theta.scale(-1.0)))
        g = g if exact is None else lowrank.add(exact, g)
        past = FactoredPast.plus(past, fisher, theta, Room(rank=8), at, at)
        lost, _ = past.slope_cut()
        change = lowrank.add(g, past.g.scale(-1.0))
        rows, columns = past.sums()
        for seed in range(5):
            torch.manual_seed(seed)
            delta = LowRank(torch.randn(40, 3), torch.randn(3, 30))
            own = lowrank.inner(delta, delta, rows / rows.max(), columns / columns.max())
            assert lowrank.inner(change, delta) ** 2 <= lost * own * 1.001 + 1e-10
    assert lost > 0


@pytest.mark.parametrize("form", ["dense", "factored", "factors"])
def test_state_of_every_form_goes_on_where_it_was(form: str) -> None:
    def fisher(t: int, adapter: Adapter) -> Fisher:
        torch.manual_seed(50 + t)
        if form == "factors":
            return Fisher({n: Factors(torch.rand_like(x.B), torch.rand_like(x.A)) for n, x in adapter.factors.items()})
        return pair(t) if form == "factored" else Fisher.of(as_dense(pair(t)))

    space = "factors" if form == "factors" else "weights"
    whole, running = Merger("optimal", space=space), None
    for t in range(6):
        new = random_adapter(t)
        again = Merger("optimal", space=space)
        how = Trained("base" if space == "factors" else "running")
        again.load_state_dict({k: v.clone() for k, v in whole.state_dict().items()}, whole.tasks)
        other = again.fold(running, new, fisher(t, new), trained=how)
        running = whole.fold(running, new, fisher(t, new), trained=how)
        assert again.report == whole.report
        assert all(torch.equal(other.factors[n].B, x.B) for n, x in running.factors.items())


def test_forms_do_not_mix() -> None:
    merger = Merger("optimal")
    running = merger.fold(None, random_adapter(0), pair(0))
    with pytest.raises(PmLlmError, match="Keep to one form"):
        merger.fold(running, random_adapter(1), as_dense(pair(1)))
    with pytest.raises(PmLlmError, match="space 'factors'"):
        Merger("optimal", space="factors").fold(None, random_adapter(0), pair(0))
    with pytest.raises(PmLlmError, match="no form"):
        past_of({"x": torch.zeros(1)})
    with pytest.raises(PmLlmError, match="dense, factored, kronecker, factors"):
        form_of("diagonal")


# ---- scales ----
def test_measured_matches_the_quadratic_to_the_loss() -> None:
    fisher = Fisher(pair(0).modules, losses=(5.0, 1.5))
    assert 3.0 / scale_of(fisher, "measured", 3.0) / 2 == pytest.approx(3.5)
    assert scale_of(fisher, "own", 3.0) == 3.0


def test_measured_is_free_of_a_factor_on_the_fisher() -> None:
    found = []
    for factor in (1.0, 100.0):
        merger = Merger("optimal", fisher_scale="measured")
        first = Fisher(pair(0).modules, losses=(4.0, 1.0))
        running = merger.fold(None, random_adapter(0), first)
        second = Fisher({n: f.divided(1 / factor) for n, f in pair(1).modules.items()}, losses=(2.0, 1.0))
        merger.fold(running, random_adapter(1), second)
        found.append(merger.report.raw_coefficient)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_exact_current_curvature_counts_in_the_coefficient() -> None:
    """With q instead of the diagonal's own quadratic the closed form still is the minimum."""
    first, second = random_adapter(0), random_adapter(1)
    merger = Merger("optimal", current="exact", clip=False)
    running = merger.fold(None, first, Fisher(pair(0).modules, exact=1.0, exact_modules={"one": 0.5, "two": 0.5}))
    merger.fold(running, second, Fisher(pair(1).modules, exact=9.0, exact_modules={"one": 4.0, "two": 5.0}))
    F, past = as_dense(pair(0)), {n: x.dense() for n, x in first.factors.items()}
    delta = {n: x.dense() for n, x in second.factors.items()}

    def objective(alpha: float) -> float:
        old = sum(float((F[n] * (past[n] + alpha * delta[n] - past[n]) ** 2).sum()) for n in F)
        return old / 2 + 9.0 * (1 - alpha) ** 2 / 2

    assert merger.report.raw_coefficient == pytest.approx(argmin(objective), abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "fisher", "expected"),
    [
        ("measured", Fisher(pair(0).modules), "losses"),
        ("best", pair(0), "raw, trace, own or measured"),
    ],
)
def test_what_was_not_measured_is_an_error(scale: str, fisher: Fisher, expected: str) -> None:
    with pytest.raises(PmLlmError, match=expected):
        scale_of(fisher, scale, 1.0)


def test_a_task_that_was_not_learnt_counts_little_but_is_no_error() -> None:
    assert 3.0 / scale_of(Fisher(pair(0).modules, losses=(1.0, 2.0)), "measured", 3.0) / 2 == pytest.approx(0.01)


def test_exact_without_its_measurement_is_an_error() -> None:
    with pytest.raises(PmLlmError, match="exact"):
        Merger("optimal", current="exact").fold(None, random_adapter(0), pair(0))


# ---- the penalty ----
@pytest.mark.parametrize("form", ["dense", "factored", "factors"])
def test_penalty_is_the_past_quadratics_up_to_a_constant(form: str) -> None:
    """P(Delta) = sum_i 1/2 (M + Delta - theta_i)' F_i (M + Delta - theta_i), less its value at M; gradient too."""
    torch.manual_seed(3)
    room, past, tasks = Room(pairs=4, rank=32), None, []
    running, before = random_adapter(9).factors["one"], None
    for t in range(3):
        theta = random_adapter(t).factors["one"]
        fisher = (
            Factors(torch.rand_like(theta.B), torch.rand_like(theta.A))
            if form == "factors"
            else pair(t).modules["one"]
            if form == "factored"
            else Fisher.of(as_dense(pair(t))).modules["one"]
        )
        past, before = type(fisher).past.plus(past, fisher, theta, room, running, before), running
        tasks.append((fisher, theta))
    live = random_adapter(10).factors["one"]
    B, A = live.B.double().requires_grad_(True), live.A.double().requires_grad_(True)

    def quadratics(delta_b, delta_a):
        total = 0.0
        for fisher, theta in tasks:
            if form == "factors":
                for f, moved, optimum in (
                    (fisher.B, delta_b, theta.B),
                    (fisher.A, delta_a, theta.A),
                ):
                    total = total + (f.double() * (moved - optimum.double()) ** 2).sum() / 2
            else:
                F = fisher.F if form == "dense" else fisher.r[:, None] * fisher.c / fisher.r.sum()
                moved = running.dense().double() + delta_b @ delta_a
                total = total + (F.double() * (moved - theta.dense().double()) ** 2).sum() / 2
        return total

    start = (running.B.double(), running.A.double()) if form == "factors" else (0 * B, 0 * A)
    expected = quadratics(B, A) - quadratics(*start)
    gb, ga = torch.autograd.grad(expected, [B, A])
    b, a = live.B.clone().requires_grad_(True), live.A.clone().requires_grad_(True)
    found = past.penalty(running)(LowRank(b, a))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    fb, fa = torch.autograd.grad(found, [b, a])
    torch.testing.assert_close(fb, gb.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fa, ga.float(), rtol=1e-3, atol=1e-5)


def test_running_adapter_in_the_model_takes_part() -> None:
    """The Fisher is taken at M + Delta: another M gives another one."""
    model = make_peft("llama", "task", random_b=True)
    alone = sum_fisher(model, batches_of("llama", 6), "factored").modules
    model.add_adapter("running", model.peft_config["task"])
    set_active(model, ["running", "task"], trainable="task")
    both = sum_fisher(model, batches_of("llama", 6), "factored").modules
    assert not torch.allclose(*(one["model.layers.0.self_attn.q_proj"]["r"] for one in (alone, both)), rtol=0.01)
