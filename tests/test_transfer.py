"""Transfer: the difference of two models as an adapter, from the command to the merge that adds it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.merges.base import Trained
from pm_llm.merges.transfer import task_vector
from tests.conftest import FAMILIES, make_model, targets, tokenizer
from tests.helpers.merging import dense, folded
from tests.invariants.test_closed_form import random_adapter


def test_transfer_adds_the_difference_of_two_models(tmp_path) -> None:
    vector = random_adapter(7)
    vector.save(tmp_path / "vector")
    came, left, _ = folded("transfer", 3, continues=False, adapter=str(tmp_path / "vector"), scale=0.5)
    for name in came[0].factors:
        expected = sum(dense(x, name) for x in came) + 0.5 * dense(vector, name)
        torch.testing.assert_close(dense(left[-1], name), expected)
    merger = Merger("transfer", adapter=str(tmp_path / "vector"), scale=0.5)
    running = None
    for new in came:  # each trained on the base model alone
        running = merger.fold(running, new, trained=Trained("base", "base"))
    for name in came[0].factors:
        torch.testing.assert_close(dense(running, name), dense(left[-1], name))
    with pytest.raises(PmLlmError, match="no_such"):
        load_config(None, {"method": "inclora", "merge": {"name": "transfer", "adapter": "no_such"}}).check()
    with pytest.raises(PmLlmError, match="name the adapter"):
        load_config(None, {"method": "inclora", "merge": "transfer"}).check()


def test_a_task_vector_of_two_models() -> None:
    base, tuned = make_model("llama", 0), make_model("llama", 1)
    names = [n for n, m in base.named_modules() if n.endswith(("q_proj", "v_proj"))]
    whole, error = task_vector(base, tuned, names, 64)
    cut, lost = task_vector(base, tuned, names, 4)
    assert error == pytest.approx(0, abs=1e-7)
    total = missing = 0.0
    for name in names:
        change = tuned.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(whole[name].dense(), change)
        s = torch.linalg.svdvals(change.detach()) ** 2
        total, missing = total + float(s.sum()), missing + float(s[4:].sum())
        assert cut[name].rank == 4
    assert lost == pytest.approx((missing / total) ** 0.5, rel=1e-4)
    with pytest.raises(PmLlmError, match="same weights"):
        task_vector(base, base, names, 4)


def test_a_task_vector_of_layers_that_hold_their_weights_the_other_way() -> None:
    """GPT-2's: the adapter makes one model of the other."""
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    base, tuned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    lora = LoraConfig(r=1, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)
    found, error = task_vector(base, tuned, lora_layers(model), 24)
    assert error < 1e-6
    Adapter.from_model(model, "default").replace_factors(found).attach(model, "vector")
    model.set_adapter("vector")
    merged = model.merge_and_unload()
    for name in ("c_attn", "c_proj"):
        weight = f"transformer.h.0.attn.{name}.weight"
        torch.testing.assert_close(merged.get_parameter(weight), tuned.get_parameter(weight), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_command_writes_an_adapter_that_makes_one_model_of_the_other(
    family, pico_folders, tmp_path, capsys
):
    tuned = make_model(family, 1)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer(family).save_pretrained(tmp_path / "tuned")
    arguments = ["vector", "--base", pico_folders[family], "--tuned", str(tmp_path / "tuned"), "--rank", "64"]
    assert main([*arguments, "--out", str(tmp_path / "v")]) == 0
    assert "relative truncation error" in capsys.readouterr().out
    base = make_model(family, 0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "v")).merge_and_unload()
    for name, p in model.named_parameters():
        if name.rpartition(".weight")[0].endswith(tuple(targets(family))):
            torch.testing.assert_close(p, tuned.get_parameter(name), atol=1e-5, rtol=1e-4)
    assert main([*arguments, "--out", str(tmp_path / "v")]) == 2  # it exists
    assert "exists" in capsys.readouterr().err
    assert (
        main(["vector", "--base", pico_folders[family], "--tuned", pico_folders[family], "--out", str(tmp_path / "w")])
        == 2
    )
    assert "same weights" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned", "v"]


def test_an_instruction_vector_is_looked_at_and_not_forgotten(tmp_path) -> None:
    vector = random_adapter(7)
    vector.save(tmp_path / "good")
    merger = Merger("transfer", adapter=str(tmp_path / "good"))
    with pytest.raises(PmLlmError, match="folded no task yet"):
        merger.fold(random_adapter(0), random_adapter(1))
    x = vector.factors["one"]
    vector.replace_factors({**vector.factors, "one": LowRank(x.B * float("nan"), x.A)}).save(tmp_path / "bad")
    with pytest.raises(PmLlmError, match="the instruction adapter has weights that are NaN"):
        Merger("transfer", adapter=str(tmp_path / "bad")).fold(None, random_adapter(0))
