"""Models of other kinds: mixtures of experts, attention that looks at places, and what is known before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pm_llm import ContinualSequence
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import generate, takes_padding
from pm_llm.evaluation.likelihood import choose_labels
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, small_tasks, tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "MixtralConfig": {"num_key_value_heads": 2, "intermediate_size": 48, **EXPERTS},
    "Qwen3MoeConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "decoder_sparse_step": 1,
        **EXPERTS,
    },
    "Qwen3NextConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "layer_types": ["linear_attention", "full_attention"],
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        "linear_value_head_dim": 8,
        **EXPERTS,
    },
    "Qwen2MoeConfig": {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
        **EXPERTS,
    },
}


def folder_of(kind: str, path: Path, **options) -> str:
    torch.manual_seed(0)
    t = tokenizer("llama")
    config = getattr(transformers, kind)(**{"vocab_size": len(t), **options})
    config.vocab_size = max(config.vocab_size, len(t))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    t.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_of_experts_are_trained_and_scored(kind: str, tmp_path) -> None:
    model = folder_of(kind, tmp_path / "m", **{**SMALL, **KINDS[kind]})
    keys = {"model": model, "output_dir": str(tmp_path / "run"), "train.max_steps": 2, "max_length": 96}
    config = load_config(None, {**keys, "fisher.samples": 4, "method": "pm_curvature"})
    results = ContinualSequence(config, small_tasks("sentiment", "topic")).run()
    assert len(results["coefficients"]) == 2


PLACES = {
    "MptConfig": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "GPTNeoConfig": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 256,
    },
    "BloomConfig": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "GPT2Config": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "LlamaConfig": {**SMALL, "intermediate_size": 48},
    "OPTConfig": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
}


@pytest.mark.parametrize("kind", PLACES)
def test_answers_do_not_depend_on_who_is_in_the_batch(kind: str, tmp_path) -> None:
    t = tokenizer("llama")
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{"vocab_size": len(t), **PLACES[kind]})
    config.vocab_size = max(config.vocab_size, len(t))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # far from zero, or all answers are one
        torch.nn.init.normal_(p, std=0.3)
    if kind in ("GPT2Config", "LlamaConfig", "OPTConfig"):
        assert takes_padding(model, 0)
        assert takes_padding(model, 3)  # and many are answered at once
    encoder = Encoder(t, DECODER, 96, 6)
    rows = [Example("the cat " + "eats fish " * (i % 7) + f"{i} ?", "yes") for i in range(24)]
    one, many = (generate(model, encoder, rows, size) for size in (1, 24))
    assert one == many
    labels = ["yes", "no", "the fish", "maybe"]
    assert choose_labels(model, encoder, rows, labels, 1) == choose_labels(model, encoder, rows, labels, 24)


@pytest.mark.parametrize(
    ("kind", "options", "keys", "said"),
    [
        ("GPT2Config", {**PLACES["GPT2Config"], "n_positions": 8}, {"max_length": 90}, "Nothing was trained"),
        ("OPTConfig", PLACES["OPTConfig"], {"lora.target_modules": "all-linear"}, "Leave it out of target_modules"),
        ("FalconConfig", SMALL, {"lora.target_modules": "all-linear"}, "Nothing was trained"),
        (
            "Qwen2MoeConfig",
            {**SMALL, **KINDS["Qwen2MoeConfig"]},
            {"lora.target_modules": "all-linear"},
            "Leave it out of target_modules",
        ),
    ],
)
def test_what_cannot_work_is_known_before_training(kind: str, options, keys, said: str, tmp_path, monkeypatch) -> None:
    model = folder_of(kind, tmp_path / "m", **options)
    monkeypatch.setattr("pm_llm.stage.train", lambda *a, **k: pytest.fail("it was trained"))
    given = {
        "model": model,
        "output_dir": str(tmp_path / "run"),
        "train.max_steps": 1,
        "fisher.samples": 2,
        "max_length": 96,
    }
    modules = {"lora.target_modules": ["c_attn"]} if kind == "GPT2Config" else {}
    with pytest.raises(PmLlmError, match=said):
        ContinualSequence(load_config(None, {**given, **modules, **keys}), small_tasks("sentiment", "topic")).run()


def test_a_token_that_the_model_does_not_have(pico_folders, tmp_path) -> None:
    from pm_llm.families.models import load_base

    t = tokenizer("llama")
    t.add_tokens([f"<word{i}>" for i in range(2000)])
    t.add_special_tokens({"pad_token": "<pad-of-another>"})
    transformers.AutoModelForCausalLM.from_pretrained(pico_folders["llama"]).save_pretrained(tmp_path)
    t.save_pretrained(tmp_path)
    with pytest.raises(PmLlmError, match="pad_token_id is"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"model_type": "no_such_kind"},
        {"num_attention_heads": 0},
        {"hidden_act": "nothing"},
    ],
)
def test_models_that_do_not_load_are_one_line(change: dict, pico_folders, tmp_path, capsys) -> None:
    import shutil

    shutil.copytree(pico_folders["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **change}))
    command = ["evaluate", "--model", str(tmp_path / "m"), "--benchmark", "embedded", "--order", "topic"]
    assert main([*command, "--max_test_samples", "2"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert [line.startswith("pm-llm: error: ") for line in error.splitlines() if "pm-llm" in line] == [True]


def test_vector_says_what_it_leaves_out(pico_folders, tmp_path, capsys) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_folders["llama"])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.01
        model.model.norm.weight += 1.0
    model.save_pretrained(tmp_path / "tuned")
    tokenizer("llama").save_pretrained(tmp_path / "tuned")
    command = ["vector", "--base", pico_folders["llama"], "--tuned", str(tmp_path / "tuned"), "--rank", "4"]
    assert main([*command, "--out", str(tmp_path / "v")]) == 0
    said = capsys.readouterr().out
    assert "left out: " in said
    assert "model.norm.weight" in said
