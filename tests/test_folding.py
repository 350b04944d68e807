"""The running adapter inside the base weights while a task trains."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from pm_llm.adapters import in_base
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.in_base import folded, why_not
from pm_llm.adapters.live import lora_layers, set_active
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.sequence import ContinualSequence
from pm_llm.system.mapped import mapped_files
from tests.conftest import FAMILIES, batch_of, features, make_model, make_peft


def two_adapters(family: str, dtype: torch.dtype = torch.float32, **options):
    model = make_peft(family, "running", random_b=True, **options)
    torch.manual_seed(9)
    model.add_adapter("task", model.peft_config["running"])
    set_active(model, ["running", "task"], trainable="task")
    return model.to(dtype).eval()


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"layers.0": 5}}])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_function_and_gradient_then_the_same_bits(family: str, options: dict) -> None:
    model = two_adapters(family, **options)
    model.get_output_embeddings().weight.data *= 0.1  # gradients as small as the bounds are made for
    batch = batch_of(family, features(family, 4))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, expected = model(**batch).logits, gradients(model, batch)
    with folded(model, "auto"):
        assert model.active_adapters == ["task"]
        torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
        found = gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert ".task." in name
        torch.testing.assert_close(found[name], g, atol=1e-6, rtol=1e-4)
    assert model.active_adapters == ["running", "task"]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_copy_is_in_files(dtype: torch.dtype, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(in_base, "IN_MEMORY", 1)
    model, made = two_adapters("llama", dtype), []

    def zeros(*shape: int) -> torch.Tensor:
        made.append(shape)
        return mapped_files(tmp_path)(*shape)

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with folded(model, "auto", zeros):
        assert not all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert len(made) == 4
    assert not list(tmp_path.iterdir())


def test_undone_after_an_error_too() -> None:
    model = two_adapters("llama", torch.bfloat16)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fails() -> None:
        with folded(model, "always"):
            assert not all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_nothing_happens_where_it_should_not(monkeypatch) -> None:
    alone = make_peft("llama", "task", random_b=True)
    for model, mode in ((alone, "auto"), (two_adapters("llama"), "never")):
        active = list(model.active_adapters)
        weights = [p.detach().clone() for p in model.parameters()]
        with folded(model, mode):
            assert model.active_adapters == active
            assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert why_not(alone) == "the launcher shards the weights"
    with pytest.raises(PmLlmError, match=r"always.*shards"), folded(two_adapters("llama"), "always"):
        pass


def test_a_shared_weight_is_left_alone() -> None:
    """A tied output layer is the embedding too: with the adapter in it the inputs would change."""
    from peft import LoraConfig, get_peft_model

    config = make_model("llama").config
    config.tie_word_embeddings = True
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["lm_head"]), adapter_name="running")
    assert why_not(model) == "the weights of lm_head are shared with another layer"


def test_a_quantised_weight_is_left_alone() -> None:
    model = two_adapters("llama")
    layer = lora_layers(model)["model.layers.1.self_attn.v_proj"].get_base_layer()
    layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert why_not(model) == "the weights of model.layers.1.self_attn.v_proj are quantised"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_comes_out_the_same_either_way(family: str, tmp_path, pico_folders) -> None:
    found = {}
    for mode in ("always", "never"):
        keys = {"model": pico_folders[family], "benchmark": "embedded", "order": "sentiment,topic,question"}
        keys |= {"max_train_samples": 16, "max_test_samples": 4, "lora.r": 4, "train.max_steps": 3}
        keys |= {"train.optim": "sgd", "train.learning_rate": 0.1, "fisher.samples": 6, "fold_running": mode}
        results = ContinualSequence(load_config(None, {**keys, "output_dir": str(tmp_path / mode)})).run()
        found[mode] = results["raw_coefficients"], Adapter.load(tmp_path / mode / "adapter")
        assert json.loads((tmp_path / mode / "results.json").read_text())["config"]["fold_running"] == mode
    assert found["always"][0] == pytest.approx(found["never"][0], rel=1e-3)
    for name, x in found["always"][1].factors.items():
        torch.testing.assert_close(x.dense(), found["never"][1].factors[name].dense(), atol=1e-5, rtol=1e-2)
