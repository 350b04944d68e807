"""How a task's adapter begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.nn import Linear
from transformers import GPT2Config, GPT2LMHeadModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import RUNNING, TASK, lora_layers, remove, trainable_adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.sections import LoraSection
from pm_llm.starts.continuing import Continue
from pm_llm.starts.fresh import Fresh
from pm_llm.starts.last import Last
from pm_llm.starts.orthogonal import Orthogonal
from pm_llm.starts.subspace import Subspace
from tests.conftest import DECODER, FAMILIES, KINDS, batch_of, features, make_model, make_peft, targets


def running_adapter(family: str) -> tuple[Adapter, torch.Tensor, dict]:
    """A random adapter of rank 4, and the logits it gives."""
    model = make_peft(family, random_b=True).eval()
    batch = batch_of(family, features(family, 3))
    with torch.no_grad():
        return Adapter.from_model(model, "default"), model(**batch).logits, batch


@pytest.mark.parametrize("start", [Fresh(), Continue()])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_starts_from_the_running_model(family: str, start) -> None:
    running, expected, batch = running_adapter(family)
    lora = LoraSection(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=targets(family))
    model = start.prepare(make_model(family), running, lora, KINDS[family]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
    assert trainable_adapter(model) == TASK
    assert model.active_adapters == ([RUNNING, TASK] if isinstance(start, Fresh) else [TASK])
    for layer in lora_layers(model).values():
        # both train at the rate the user asked for, with the user's dropout
        assert layer.scaling[TASK] == pytest.approx(8.0)
        assert layer.lora_dropout[TASK].p == 0.1


@pytest.mark.parametrize("start", [Fresh(), Continue()])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_some_blocks(family: str, start, tmp_path) -> None:
    """PEFT refuses the word next to `layers_to_transform`; also beside an adapter, and when the result is loaded."""
    block = 1 if family == "llama" else 0
    lora = LoraSection(r=4, target_modules="all-linear", layers_to_transform=[block])
    first = Fresh().prepare(make_model(family), None, lora, KINDS[family])
    linear = [name for name, module in make_model(family).named_modules() if isinstance(module, Linear)]
    expected = {name for name in linear if f".{block}." in name}
    assert len(expected) == (7 if family == "llama" else 16)
    assert set(lora_layers(first)) == expected
    running = Adapter.from_model(first, TASK)
    model = start.prepare(make_model(family), running, lora, KINDS[family])
    assert set(lora_layers(model)) == set(running.factors) == expected
    running.save(tmp_path)
    assert set(lora_layers(PeftModel.from_pretrained(make_model(family), tmp_path))) == expected


def test_last_and_orthogonal_begin_where_training_ended() -> None:
    """Not at the merged adapter; at the user's scaling; orthogonal with an orthonormal basis of the rows of A."""
    running, _, batch = running_adapter("llama")
    last = running.replace_factors({n: LowRank(torch.randn_like(x.B), x.A) for n, x in running.factors.items()})
    lora = LoraSection(r=4, lora_alpha=32, target_modules=targets("llama"))
    found = {}
    for start in (Last(), Orthogonal()):
        model = start.prepare(make_model("llama"), running, lora, DECODER, last).eval()
        assert trainable_adapter(model) == TASK
        assert model.active_adapters == [TASK]
        assert all(layer.scaling[TASK] == pytest.approx(8.0) for layer in lora_layers(model).values())
        found[type(start)] = Adapter.from_model(model, TASK).factors
        with torch.no_grad():
            model(**batch)
    for name, x in last.factors.items():
        torch.testing.assert_close(found[Last][name].dense(), x.dense())
        a, b = found[Orthogonal][name].A, found[Orthogonal][name].B
        torch.testing.assert_close(b, x.B)
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
        r = x.A @ a.T  # A = R' Q', lower triangular, and the basis is signed so that its diagonal is positive
        torch.testing.assert_close(r @ a, x.A, atol=1e-5, rtol=1e-4)
        assert r.triu(1).abs().max() < 1e-4
        assert (r.diagonal() > 0).all()
    for start in (Last(), Orthogonal()):  # the first task has none: a fresh adapter
        model = start.prepare(make_model("llama"), None, lora, DECODER)
        assert all(not x.B.any() for x in Adapter.from_model(model, TASK).factors.values())


@pytest.mark.parametrize("start", [Fresh(), Continue()])
def test_again_and_again(start) -> None:
    """Task after task on one model: adapters do not pile up, and the model stays the running one."""
    running, expected, batch = running_adapter("llama")
    model = make_model("llama")
    for _ in range(3):
        model = start.prepare(model, running, LoraSection(r=4), DECODER).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
        assert set(model.peft_config) <= {RUNNING, TASK}
        running = Adapter.from_model(model, TASK) if start.stands_on == "base" else running
        running.attach(model, RUNNING)  # as the sequence does after a merge
        remove(model, TASK)
        assert set(model.peft_config) == {RUNNING}


def directions_of_inputs(model, family: str, rank: int) -> dict[str, torch.Tensor]:
    """CorDA's `[W C]_r C^-1` by its formula: C is the rows' mean of X'X, each row over its largest entry, damped."""
    layers, taken = lora_layers(model), {}

    def take(name: str):
        return lambda module, inputs: taken.setdefault(name, []).append(inputs[0].flatten(0, -2).double())

    hooks = [layer.register_forward_pre_hook(take(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for row in features(family, 4):
            model(**batch_of(family, [row]))
    for hook in hooks:
        hook.remove()
    found = {}
    for name, inputs in taken.items():
        c = torch.stack([(x / x.max()).T @ (x / x.max()) for x in inputs]).mean(0)
        c += 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        u, s, vh = torch.linalg.svd(layers[name].get_base_layer().weight.detach().double() @ c, full_matrices=False)
        found[name] = (u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(c)).float()
    return found


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "eva"])
@pytest.mark.parametrize("family", FAMILIES)
def test_subspace_begins_at_the_running_model_and_leaves_the_base(family: str, init: str) -> None:
    """In PEFT's subspace, at the running model's function, with a task vector of zero; and the base is untouched."""
    running, expected, batch = running_adapter(family)
    base = make_model(family)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    start, lora = (
        Subspace(init),
        LoraSection(r=8 if init == "eva" else 4, lora_alpha=8, target_modules=targets(family)),
    )
    model = start.prepare(base, running, lora, KINDS[family]).eval()
    seen = directions_of_inputs(model, family, 4) if init == "corda" else {}
    rows = [batch_of(family, [row]) for row in features(family, 4)]
    alone = SimpleNamespace(num_processes=1)
    start.look(model, SimpleNamespace(one_by_one=lambda _: rows, count=len(rows), state=alone, family=KINDS[family]))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert trainable_adapter(model) == TASK
    assert model.active_adapters == [RUNNING, TASK]
    raw = Adapter.from_model(model, TASK)
    update = start.as_update(raw)
    live = start.as_live(update)
    for name, x in raw.factors.items():
        torch.testing.assert_close(live.factors[name].dense(), x.dense(), atol=1e-5, rtol=1e-4)
        assert update.factors[name].dense().abs().max() < 1e-5
        w = before[f"{name}.weight"]
        if init == "pissa":  # the best approximation of the base weight
            u, s, vh = torch.linalg.svd(w)
            best = u[:, :4] * s[:4] @ vh[:4]
            torch.testing.assert_close(x.dense(), best, atol=1e-4, rtol=1e-3)
        if init == "olora":
            b = x.B / x.B.norm(dim=0)
            torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-4, rtol=0)
        if init == "corda":
            torch.testing.assert_close(x.dense(), seen[name], atol=1e-3, rtol=1e-2)
        if init == "eva":
            torch.testing.assert_close(x.A @ x.A.T, torch.eye(8), atol=1e-4, rtol=0)  # more than an answer has tokens
            assert not x.B.any()
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_corda_refuses_what_it_cannot_do_and_leaves_the_model_as_it_was() -> None:
    alone = SimpleNamespace(num_processes=1)
    rows = [batch_of("llama", [row]) for row in features("llama", 4)]
    for given, expected in ((None, "cannot make 'corda'"), ([], "needs a row")):
        start = Subspace("corda")
        model = start.prepare(make_model("llama"), None, LoraSection(r=4), DECODER)
        model.train()
        if given is None:  # a state that is not a number
            model.get_base_model().model.embed_tokens.weight.data.fill_(float("nan"))
        seen = SimpleNamespace(one_by_one=lambda _, g=given: rows if g is None else g, state=alone, family=DECODER)
        seen.count = 4 if given is None else len(given)
        with pytest.raises(PmLlmError, match=expected):
            start.look(model, seen)
        assert model.training
        for layer in lora_layers(model).values():
            linear = layer.get_base_layer()
            assert not linear._forward_hooks
            assert not hasattr(linear, "covariance_matrix")


def test_subspace_refuses_what_it_cannot_do() -> None:
    with pytest.raises(PmLlmError, match="pissa, olora"):
        Subspace("loftq")
    for init, rank in (("corda", 17), ("pissa", 17), ("pissa_niter_4", 17), ("olora", 17), ("eva", 33)):
        with pytest.raises(PmLlmError, match=f"{init} cannot give .* by 32, the rank {rank}"):
            Subspace(init).prepare(make_model("llama"), None, LoraSection(r=rank), DECODER)
    for constrain in ("perturb", "sparse", "null_space"):
        with pytest.raises(PmLlmError, match="begins at zero"):
            load_config(None, {"method": "inclora", "start": "subspace", "constrain": constrain}).check()
    with pytest.raises(PmLlmError, match="not in 4 bits"):
        load_config(None, {"method": "pissa", "load_in_4bit": True}).check()
    assert load_config(None, {"method": "pissa", "constrain": "slow"}).check()
    assert load_config(None, {"method": "pm", "start": {"name": "subspace", "init": "eva"}}).check()


def test_olora_refuses_weights_that_lie_the_other_way() -> None:
    """PEFT takes the QR factors of what GPT-2's Conv1D holds, (d_in, d_out), as if it were (d_out, d_in)."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    for target in ("c_proj", "c_attn"):
        with pytest.raises(PmLlmError, match=r"PEFT cannot make .olora. of .*Conv1D"):
            Subspace("olora").prepare(base, None, LoraSection(r=2, target_modules=[target]), DECODER)


@pytest.mark.parametrize(
    "init", ["eva_niter_", "corda_niter_", "olora_niter_", "pissa_niter_", "pissa_niter_x", "svd"]
)
def test_subspaces_that_do_not_exist(init: str) -> None:
    with pytest.raises(PmLlmError, match="must be pissa, olora, corda, eva or pissa_niter_N"):
        Subspace(init)


def test_what_is_added_up_may_begin_at_the_last_adapter() -> None:
    """Only a merge that brings a vector of other origin needs a start that has it."""
    for merge in ("sum", "task_arithmetic"):
        assert load_config(None, {"method": "inclora", "start": "last", "merge": merge}).check()
