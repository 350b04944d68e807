"""Constraints against their formulas, written differently, and in their limit cases."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pm_llm import Perturb
from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.align import Align
from pm_llm.constraints.base import Context, Live, Step
from pm_llm.constraints.ewc import Ewc
from pm_llm.constraints.gaussian import Gaussian
from pm_llm.constraints.l2 import L2
from pm_llm.constraints.lori import Lori
from pm_llm.constraints.migu import Migu
from pm_llm.constraints.orthogonal import Orthogonal
from pm_llm.constraints.refresh import Refresh
from pm_llm.constraints.replay import Replay
from pm_llm.constraints.slow import Slow
from pm_llm.constraints.sparse import Sparse
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.of_factors import Factors
from pm_llm.methods import CONSTRAINTS, Choice
from tests.conftest import DECODER, FAMILIES, KINDS, make_model, make_peft
from tests.helpers.step_script import make_trainer, one_step, weights
from tests.invariants.test_step import assert_same

NAMES = ("one", "two")


def pair(seed: int, rank: int = 2) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: LowRank(
            torch.randn(4, rank, generator=generator).double(), torch.randn(rank, 3, generator=generator).double()
        )
        for n in NAMES
    }


def flat(x: dict[str, LowRank]) -> torch.Tensor:
    return torch.cat([side.flatten() for n in NAMES for side in (x[n].B, x[n].A)])


def unflat(v: torch.Tensor) -> dict[str, LowRank]:
    parts = [v[i * 14 : (i + 1) * 14] for i in range(2)]
    return {n: LowRank(p[:8].view(4, 2), p[8:].view(2, 3)) for n, p in zip(NAMES, parts, strict=True)}


# ---- penalties ----
def numeric_gradient(function, at: torch.Tensor, size: float = 1e-6) -> torch.Tensor:
    found = torch.zeros_like(at)
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = size
        found[i] = (function(at + step) - function(at - step)) / (2 * size)
    return found


@pytest.mark.parametrize("online", [False, True])
def test_ewc_pulls_to_the_optima_with_the_fishers(online: bool) -> None:
    ewc = Ewc(weight=3.0, online=online, gamma=0.5)
    optima, fishers = [pair(0), pair(1)], [pair(2), pair(3)]
    for task, (theta, fisher) in enumerate(zip(optima, fishers, strict=True), start=1):
        measured = Fisher({n: Factors(f.B**2, f.A**2) for n, f in fisher.items()})
        ewc.remember(Context(task, new=theta, fisher=measured))
    again = Ewc(weight=3.0, online=online, gamma=0.5)
    again.load_memory({key: x.clone() for key, x in ewc.memory().items()})
    again.prepare(Context(3, running=optima[-1]))
    at = flat(pair(4))
    found = numeric_gradient(lambda v: float(again.penalty(unflat(v))), at)
    (f1, f2), (o1, o2) = (flat(x) ** 2 for x in fishers), (flat(x) for x in optima)
    expected = 3 * (0.5 * f1 + f2) * (at - o2) if online else 3 * (f1 * (at - o1) + f2 * (at - o2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    off = Ewc(weight=0.0)
    off.load_memory(ewc.memory())
    off.prepare(Context(3, running=optima[-1]))
    assert off.penalty(pair(4)) is None
    assert Ewc().penalty(pair(4)) is None  # before anything was learned


def test_l2_orthogonal_and_sparse_are_their_formulas() -> None:
    live, before = pair(0), pair(1)
    l2, orthogonal, sparse = L2(weight=0.7), Orthogonal(weight=0.3), Sparse(weight=0.2)
    for one in (l2, orthogonal):
        assert one.penalty(live) is None  # in the first task
        one.prepare(Context(2, running=before))
    assert float(l2.penalty(live)) == pytest.approx(0.35 * float((flat(live) - flat(before)).norm() ** 2))
    overlap = sum(abs(float(a @ b)) for n in NAMES for a in before[n].A for b in live[n].A)
    assert float(orthogonal.penalty(live)) == pytest.approx(0.3 * overlap)
    total = sum(float(torch.linalg.norm(x.dense().flatten(), 1)) for x in live.values())
    assert float(sparse.penalty(live)) == pytest.approx(0.2 * total)
    for cls in (L2, Orthogonal, Sparse):
        off = cls(weight=0.0)
        off.prepare(Context(2, running=before))
        assert off.penalty(live) is None


# ---- around the pass ----
@pytest.mark.parametrize("family", FAMILIES)
def test_gaussian_does_not_depend_on_the_split_and_is_undone(family: str, tmp_path) -> None:
    whole = one_step(make_trainer(family, str(tmp_path), 16, 1, Gaussian(0.3)))
    parts = one_step(make_trainer(family, str(tmp_path), 4, 4, Gaussian(0.3)))
    plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    none = one_step(make_trainer(family, str(tmp_path), 16, 1, Gaussian(0.0)))
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)
    assert_same(whole[1], parts[1], atol=1e-5, rtol=1e-3)
    assert abs(whole[0] - plain[0]) > 1e-3
    assert none[0] == pytest.approx(plain[0], rel=1e-6)
    live = live_adapter(family)
    before = [p.data.clone() for p in live.parameters()]
    sizes = []

    def fail() -> None:
        with Gaussian(0.3).around(Step(0, 5), live, {}):
            for p, b in moved(live, before):
                sizes.append(float((p - b).square().mean().sqrt() / b.square().mean().sqrt()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(torch.equal(p, b) for p, b in moved(live, before))
    assert sum(sizes) / len(sizes) == pytest.approx(0.3, rel=0.1)


def live_adapter(family: str = "llama", **options) -> Live:
    model = make_peft(family, random_b=True, **options)
    return Live(lora_layers(model), "default")


def moved(live: Live, before: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p.data, b) for p, b in zip(live.parameters(), before, strict=True)]


def test_scales_that_cover_the_expected_coefficient() -> None:
    assert {Perturb(epsilon=0.0, scales="cover").scale(Step(0, i)) for i in range(20)} == {1.0}
    perturb = Perturb(scales="cover", probability=0.25)
    perturb.prepare(Context(4))
    found = Counter(perturb.scale(Step(0, step)) for step in range(4000))
    assert set(found) == {1.0, 0.25}
    assert found[0.25] / 4000 == pytest.approx(0.5, abs=0.03)
    perturb.prepare(Context(1))
    assert {perturb.scale(Step(0, step)) for step in range(50)} == {1.0}
    for step in range(50):
        perturb.observe(Step(0, step), torch.tensor(1.0))
    assert perturb.logs({key: [float(x) for x in sums] for key, sums in perturb.state_dict().items()}) == {}


def test_refresh_goes_up_before_it_goes_down(tmp_path) -> None:
    plain = one_step(make_trainer("llama", str(tmp_path), 16, 1))
    none = one_step(make_trainer("llama", str(tmp_path), 16, 1, Refresh(rate=0.0)))
    assert none[0] == pytest.approx(plain[0], rel=1e-6)
    trainer = make_trainer("llama", str(tmp_path), 16, 1, Refresh(rate=0.1, curvature=2.0), learning_rate=0.0)
    found = one_step(trainer)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(-found[1][name], 0.1 * gradient / (1 + 2 * gradient**2), atol=1e-5, rtol=1e-3)
    assert found[0] > plain[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_refresh_takes_a_passs_gradient_on_the_scale_of_a_step(family: str, tmp_path) -> None:
    def trainer(*args, **options):
        made = make_trainer(family, str(tmp_path), *args, **options)
        made.model.get_output_embeddings().weight.data *= 0.1  # gradients as small as the bounds are made for
        return made

    plain = one_step(trainer(16, 1))
    found = one_step(trainer(4, 4, Refresh(rate=1e-3, curvature=0.0), learning_rate=0.0))
    for name, gradient in plain[1].items():  # four passes, each with its share of the step's tokens
        torch.testing.assert_close(-found[1][name], 4e-3 * gradient, atol=2e-5, rtol=2e-2)


# ---- around the update ----
@pytest.mark.parametrize("family", FAMILIES)
def test_migu_updates_the_rows_with_the_largest_outputs(family: str, tmp_path) -> None:
    plain = one_step(make_trainer(family, str(tmp_path), 16, 1))
    found = {}
    for task, accumulation in ((1, 1), (2, 1), (2, 4)):
        migu = Migu(threshold=0.7)
        migu.prepare(Context(task))
        found[task, accumulation] = one_step(
            make_trainer(family, str(tmp_path), 16 // accumulation, accumulation, migu)
        )
    assert_same(found[1, 1][1], plain[1], atol=1e-6, rtol=1e-5)  # all rows in the first task
    assert_same(found[2, 1][1], found[2, 4][1], atol=1e-5, rtol=1e-3)
    trainer = make_trainer(family, str(tmp_path), 16, 1)
    outputs: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(trainer.model).items():
        for side in ("lora_A", "lora_B"):

            def take(module, _, output, key=f"{name}.{side}"):
                real = masks[output.shape[:2]]
                outputs[key] = outputs.get(key, 0) + (output.detach().abs() * real[..., None]).sum(dim=(0, 1))

            getattr(layer, side)["default"].register_forward_hook(take)
    masks: dict = {}

    def look(module, args, kwargs):
        for mask in (kwargs["attention_mask"], kwargs["labels"] != -100)[: 2 if family == "t5" else 1]:
            assert mask.shape not in masks
            masks[mask.shape] = mask.bool()

    trainer.model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    one_step(trainer)
    for key, sums in outputs.items():
        name = next(n for n in plain[1] if key in n)
        rows = found[2, 1][1][name].abs().sum(1) > 0
        assert int(rows.sum()) == len(sums) - int(0.7 * (len(sums) - 1) + 0.9999)  # at or above the 0.7 quantile
        assert set(rows.nonzero().flatten().tolist()) == set(sums.topk(int(rows.sum())).indices.tolist())
        torch.testing.assert_close(found[2, 1][1][name][rows], plain[1][name][rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reset", ["running", "zero"])
def test_align_sets_back_what_turned_against_the_important(reset: str) -> None:
    live = live_adapter()
    running = {
        n: LowRank(torch.randn_like(live.weights(n)[1]), torch.randn_like(live.weights(n)[0])) for n in live.layers
    }
    align = Align(every=3, share=0.5, reset=reset)
    align.prepare(Context(2, running=running))
    before = [p.data.clone() for p in live.parameters()]
    for step in (0, 1):
        align.after_update(Step(0, step), live)
        assert all(torch.equal(p, b) for p, b in moved(live, before))
    align.after_update(Step(0, 2), live)
    olds = iter(before)
    for name in live.layers:
        for p, value in zip(live.weights(name), (running[name].A, running[name].B / live.scaling(name)), strict=True):
            old, size = next(olds), sorted(value.abs().flatten().tolist(), reverse=True)[value.numel() // 2 - 1]
            for now, then, v in zip(p.data.flatten(), old.flatten(), value.data.flatten(), strict=True):
                turned = abs(float(v)) >= size and float(then) * float(v) < 0
                assert float(now) == float((v if reset == "running" else v * 0) if turned else then)
    first = Align()
    first.after_update(Step(0, 49), live)  # nothing is running yet


def test_slow_is_a_learning_rate_for_each_group(tmp_path) -> None:
    plain = one_step(make_trainer("llama", str(tmp_path), 16, 1))
    rates = {"layers.0.*lora_A": 0.0, "lora_A": 0.25, "v_proj.lora_B": 3.0}
    found = one_step(make_trainer("llama", str(tmp_path), 16, 1, Slow(rates)))
    for name, gradient in plain[1].items():
        rate = 1.0
        if "lora_A" in name:
            rate = 0.0 if "layers.0" in name else 0.25
        elif "v_proj" in name:
            rate = 3.0
        torch.testing.assert_close(found[1][name], rate * gradient, atol=1e-5, rtol=1e-3)
    trainer = make_trainer("llama", str(tmp_path), 16, 1)
    for rates in ({"mlp": 0.1}, {"lora_A": 0.1, "q_proj.lora_A": 0.5}):
        with pytest.raises(PmLlmError, match="fit none of the adapted modules that those before them left"):
            Slow(rates).prepare(Context(1, live=trainer.live))


def test_lori_trains_few_entries_of_b_and_nothing_of_a(tmp_path) -> None:
    lori = Lori(keep=0.1, calibration=0.5)
    trainer = make_trainer("llama", str(tmp_path), 16, 1, lori, max_steps=6, optim="adamw_torch", learning_rate=1e-2)
    before = weights(trainer.model)
    lori.prepare(Context(1))
    trainer.train()
    after = weights(trainer.model)
    b = torch.cat([x.flatten() for name, x in after.items() if "lora_B" in name])
    assert 0 < int((b != 0).sum()) <= round(0.1 * b.numel())
    assert all(torch.equal(after[name], x) for name, x in before.items() if "lora_A" in name)
    whole = Lori(keep=1.0, calibration=0.0)
    whole.prepare(Context(1))
    plain = one_step(make_trainer("llama", str(tmp_path), 16, 1))[1]
    found = one_step(make_trainer("llama", str(tmp_path), 16, 1, whole))[1]
    for name, gradient in plain.items():
        expected = gradient if "lora_B" in name else torch.zeros_like(gradient)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-3)


# ---- rows ----
def rows_of(task: int, count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [task] * (i % 3 + 1), "labels": [task, i]} for i in range(count)]


def test_replay_keeps_a_share_of_each_task() -> None:
    replay = Replay(share=0.1, longer=True)
    for task in (1, 2, 3):
        again = Replay(share=0.1, longer=True)
        if task > 1:
            again.load_memory(replay.memory())
            assert again.kept == replay.kept
        context = Context(task, rows=rows_of(task, 40), seed=task)
        mixed = again.rows(context.rows, context)
        assert Counter(row["labels"][0] for row in mixed) == {task: 40, **dict.fromkeys(range(1, task), 4)}
        assert again.steps(100, context) == 100 + 10 * (task - 1)
        assert again.steps(-1, context) == -1  # by epochs, which grow by themselves
        assert Replay().steps(100, context) == 100
        again.remember(context)
        replay = again


def test_a_reservoir_draws_evenly_from_all_it_has_seen() -> None:
    counts: Counter = Counter()
    for seed in range(300):
        replay = Replay(share=0.1, buffer="reservoir")
        for task in (1, 2, 3):
            again = Replay(share=0.1, buffer="reservoir")
            if task > 1:
                again.load_memory(replay.memory())
            again.remember(Context(task, rows=rows_of(task, 50), seed=seed * 10 + task))
            replay = again
        assert len(replay.kept) == 5
        counts.update(row["labels"][0] for row in replay.kept)
    assert all(count == pytest.approx(500, abs=75) for count in counts.values())


def test_refresh_passes_over_what_the_loss_does_not_reach(tmp_path) -> None:
    """As of a vision tower beside a language model that reads text."""
    base = make_model("llama")
    base.model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    trainer = make_trainer("llama", str(tmp_path), 16, 1, Refresh(rate=0.1), model=model)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, x in weights(trainer.model).items() if not torch.equal(x, before[name])}
    assert any("layers.0" in name for name in moved)
    assert not any("tower" in name for name in moved)


def test_padding_beside_a_head_that_is_adapted() -> None:
    """Its inputs are the decoder's."""
    batch = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[5, -100]])}
    for name, expected in (("lm_head", [1, 0]), ("encoder.block.0.q", [1, 1, 0]), ("decoder.block.0.q", [1, 0])):
        assert KINDS["t5"].tokens(name, batch).int().tolist() == [expected]
    assert KINDS["t5"].tokens("decoder.block.0.EncDecAttention.k", batch).int().tolist() == [[1, 1, 0]]
    assert DECODER.tokens("lm_head", batch).int().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(("calibration", "steps"), [(0.9, 5), (0.25, 2), (0.0, 2)])
def test_lori_leaves_a_step_to_train_what_it_chose(calibration: float, steps: int, tmp_path) -> None:
    lori = Lori(keep=0.1, calibration=calibration)
    trainer = make_trainer("llama", str(tmp_path), 16, 1, lori, max_steps=steps, learning_rate=1e-2)
    lori.prepare(Context(1))
    trainer.train()
    assert any(bool(x.any()) for name, x in weights(trainer.model).items() if "lora_B" in name)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_trainer_alone_refuses_what_was_not_told_its_task(name: str, tmp_path) -> None:
    constraint = Choice.parse(name, "constrain").build("constrain")
    trainer = make_trainer("llama", str(tmp_path), 16, 1, constraint, max_steps=2)
    if constraint.by_itself:
        trainer.train()
    else:
        with pytest.raises(PmLlmError, match=f"{type(constraint).__name__} does not know its task"):
            trainer.train()
    assert constraint.by_itself == (name in {"anchor", "gaussian", "lori", "perturb", "refresh", "slow", "sparse"})
    assert not Perturb(scales="cover").by_itself


def test_a_constraint_is_told_of_every_task(tmp_path) -> None:
    constraint = L2()
    constraint.prepare(Context(1))
    make_trainer("llama", str(tmp_path), 16, 1, constraint, max_steps=1).train()
    with pytest.raises(PmLlmError, match="L2 does not know its task"):
        make_trainer("llama", str(tmp_path), 16, 1, constraint, max_steps=1).train()


def test_lori_needs_two_steps(tmp_path) -> None:
    trainer = make_trainer("llama", str(tmp_path), 16, 1, Lori(), max_steps=1)
    with pytest.raises(PmLlmError, match="lori: a task of one step leaves none"):
        trainer.train()
