"""Laws 1 to 3: coefficients 1 and 0 are the adapters themselves, a fold changes no logit, files hold all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers, scaled, set_active
from pm_llm.merges.merger import Merger
from tests.conftest import FAMILIES, batch_of, features, make_model, make_peft, targets

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": "patterns",
}


def options(kind: str, family: str) -> dict:
    if kind != "patterns":
        return KINDS[kind]
    first, _ = targets(family)
    return {"rank_pattern": {first: 2}, "alpha_pattern": {first: 7}}


def two_adapters(family: str, kind: str):
    """A model with `running` and `new` (both random, of one kind) and a batch."""
    model = make_peft(family, "running", random_b=True, **options(kind, family))
    config = LoraConfig(
        **{
            **{"r": 3, "lora_alpha": 5, "target_modules": targets(family), "init_lora_weights": False},
            **options(kind, family),
        }
    )
    torch.manual_seed(7)
    model.add_adapter("new", config)
    return model.eval(), batch_of(family, features(family, 4))


def logits(model, batch, *names: str) -> torch.Tensor:
    set_active(model, list(names), trainable=None)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
class TestFold:
    def test_coefficient_one_is_running_plus_new(self, family: str, kind: str) -> None:
        model, batch = two_adapters(family, kind)
        running, new = Adapter.from_model(model, "running"), Adapter.from_model(model, "new")
        expected = logits(model, batch, "running", "new")
        assert not torch.allclose(expected, logits(model, batch, "running"), atol=1e-3)  # the new one does something
        Merger("sum").fold(running, new).attach(model, "merged")
        torch.testing.assert_close(logits(model, batch, "merged"), expected, atol=1e-5, rtol=0)

    def test_first_fold_is_the_new_adapter(self, family: str, kind: str) -> None:
        model, batch = two_adapters(family, kind)
        Merger("constant", coefficient=0.3).fold(None, Adapter.from_model(model, "new")).attach(model, "merged")
        expected = logits(model, batch, "new")
        torch.testing.assert_close(logits(model, batch, "merged"), expected, atol=1e-5, rtol=0)

    def test_coefficient_zero_is_the_running_adapter(self, family: str, kind: str) -> None:
        model, batch = two_adapters(family, kind)
        running, new = Adapter.from_model(model, "running"), Adapter.from_model(model, "new")
        Merger("constant", coefficient=0.0).fold(running, new).attach(model, "merged")
        expected = logits(model, batch, "running")
        torch.testing.assert_close(logits(model, batch, "merged"), expected, atol=1e-5, rtol=0)

    def test_fold_equals_both_active(self, family: str, kind: str) -> None:
        model, batch = two_adapters(family, kind)
        running, new = Adapter.from_model(model, "running"), Adapter.from_model(model, "new")
        with scaled(lora_layers(model).values(), "new", 0.37):
            expected = logits(model, batch, "running", "new")
        Merger("constant", coefficient=0.37).fold(running, new).attach(model, "merged")
        torch.testing.assert_close(logits(model, batch, "merged"), expected, atol=1e-5, rtol=0)


LOADER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
for folder, (family, base) in json.loads(sys.argv[1]).items():
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base), f"{folder}/adapter").eval()
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/batch.pt")).logits, f"{folder}/out.pt")
assert not any(name.startswith("pm_llm") for name in sys.modules)
"""


def test_round_trip_in_a_fresh_process(tmp_path, pico_folders) -> None:
    """By PEFT alone, of every family and kind of adapter."""
    merged, expected, jobs = {}, {}, {}
    for family in FAMILIES:
        for kind in KINDS:
            model, batch = two_adapters(family, kind)
            running, new = Adapter.from_model(model, "running"), Adapter.from_model(model, "new")
            folder = tmp_path / f"{family}-{kind}"
            merged[folder] = Merger("constant", coefficient=0.6, max_rank=5).fold(running, new)
            merged[folder].save(folder / "adapter")
            merged[folder].attach(model, "merged")
            expected[folder] = logits(model, batch, "merged")
            torch.save(batch, folder / "batch.pt")
            jobs[str(folder)] = (family, pico_folders[family])
    command = [sys.executable, "-c", LOADER, json.dumps(jobs)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    for folder, logit in expected.items():
        torch.testing.assert_close(torch.load(folder / "out.pt"), logit, atol=0, rtol=0)
        reread = Adapter.load(folder / "adapter")
        assert reread.rank == 5
        for name, x in merged[folder].factors.items():
            assert torch.equal(reread.factors[name].A, x.A)
            assert torch.equal(reread.factors[name].B, x.B)


def test_the_base_of_pico_folders_is_the_model(pico_folders) -> None:
    for family in FAMILIES:
        from safetensors.torch import load_file

        weights = load_file(f"{pico_folders[family]}/model.safetensors")
        state = make_model(family).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
