"""4-bit bases end to end, on CPU: the running merge stays an adapter, and the base is never touched."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pm_llm import ContinualSequence
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.in_base import why_not
from pm_llm.adapters.live import TASK, lora_layers, set_active
from pm_llm.algebra.lowrank import LowRank
from pm_llm.cli import main
from pm_llm.evaluation.generate import generate
from pm_llm.families.models import load_base
from pm_llm.fisher.measure import sum_fisher
from pm_llm.sections import LoraSection
from pm_llm.starts.fresh import Fresh
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, FAMILIES, batch_of, features, tokenizer
from tests.helpers.runs import config_for
from tests.helpers.stops import stopping

bitsandbytes = pytest.importorskip("bitsandbytes")


def weights(model) -> dict[str, torch.Tensor]:
    """All of the base, packed weights and their scales included."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" not in name:
            name = name.replace(".base_layer", "").removeprefix("base_model.model.")
            found[name] = p.detach().clone()
            if getattr(p, "quant_state", None) is not None:
                found |= {f"{name}.{key}": x.clone() for key, x in p.quant_state.as_dict(packed=True).items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_the_base_as_it_was(family: str, pico_folders, tmp_path, capsys) -> None:
    sequence = ContinualSequence(config_for(pico_folders[family], tmp_path / "run", load_in_4bit=True))
    results = sequence.run()
    assert 0 <= results["coefficients"][2] <= 1
    layers = lora_layers(sequence.session.model).values()
    assert all(isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit) for layer in layers)
    fresh = load_base(pico_folders[family], load_in_4bit=True)
    before, after = weights(fresh.model), weights(sequence.session.model)
    assert before.keys() == after.keys()
    assert any(name.endswith("bitsandbytes__nf4") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    curvature = load_file(tmp_path / "run/stages/03-question/curvature.safetensors")
    assert all(torch.isfinite(x).all() for x in curvature.values())
    assert all(x.any() for name, x in curvature.items() if name.startswith("S."))
    model = PeftModel.from_pretrained(fresh.model, str(tmp_path / "run/adapter")).eval()
    batch = batch_of(family, features(family, 4))
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, sequence.session.model.eval()(**batch).logits, atol=0, rtol=0
        )
    capsys.readouterr()
    arguments = ["--model", pico_folders[family], "--benchmark", "embedded", "--order", "sentiment,topic,question"]
    arguments += ["--max_test_samples", "4", "--max_length", "96", "--load_in_4bit", "true"]
    assert main(["evaluate", "--adapter", str(tmp_path / "run/adapter"), *arguments]) == 0
    scores = [float(line.split("\t")[1]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert scores == pytest.approx(results["matrix"][-1], abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_the_fisher_sees_a_quantised_base(family: str, pico_folders) -> None:
    """Row and column sums are those of the dense Fisher; the exact curvature is the same in every form."""
    base = load_base(pico_folders[family], load_in_4bit=True)
    model = Fresh().prepare(base.model, None, LoraSection(r=4), base.family)
    task = Adapter.from_model(model, TASK)
    task = task.replace_factors({n: LowRank(torch.randn_like(x.B) / 10, x.A) for n, x in task.factors.items()})
    task.attach(model, TASK)
    set_active(model, [TASK], trainable=TASK)
    batches = [batch_of(family, features(family, 5))]
    found = {form: sum_fisher(model, batches, form, task.factors).mean() for form in ("dense", "factored", "factors")}
    for name, dense in found["dense"].modules.items():
        assert dense.F.max() > 0
        torch.testing.assert_close(found["factored"].modules[name].r, dense.F.sum(1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found["factored"].modules[name].c, dense.F.sum(0), rtol=1e-4, atol=1e-7)
    assert found["factored"].exact == pytest.approx(found["dense"].exact, rel=1e-5)
    assert found["factors"].exact == pytest.approx(found["dense"].exact, rel=1e-5)
    assert why_not(model).endswith("are quantised")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_it_goes_on(family: str, where: str, pico_folders, tmp_path) -> None:
    keys = {"load_in_4bit": True, "train.save_steps": 2}
    whole = ContinualSequence(config_for(pico_folders[family], tmp_path / "whole", **keys)).run()
    stopped = ContinualSequence(config_for(pico_folders[family], tmp_path / "parts", **keys))
    with stopping(where, 2, after=True), pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = ContinualSequence(config_for(pico_folders[family], tmp_path / "parts", **keys)).run()
    for key in ("matrix", "coefficients", "raw_coefficients"):
        assert resumed[key] == whole[key]
    a, b = (load_file(tmp_path / d / "adapter/adapter_model.safetensors") for d in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluation_does_not_repack_the_base() -> None:
    """The embedded LLaMA has a layer that bitsandbytes cannot repack, where it does (CPUs with AVX512-BF16)."""
    base = load_base("embedded:llama", load_in_4bit=True)
    before = weights(base.model)
    generate(base.model, Encoder(tokenizer("llama"), DECODER, 64, 4), make_task("topic", 4, 1).train, 4)
    after = weights(base.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapter_is_in_full_precision(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run", load_in_4bit=True, dtype="bfloat16")
    ContinualSequence(config).run()
    state = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert Adapter.load(tmp_path / "run/adapter").rank > 4
    written = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == pico_folders["llama"]


def test_without_bitsandbytes_it_says_what_to_install(pico_folders, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--model", pico_folders["llama"], "--benchmark", "embedded", "--load_in_4bit", "true"]
    assert main(["run", *arguments, "--output_dir", str(tmp_path / "run")]) == 2
    assert 'pip install "pm_llm[qlora]"' in capsys.readouterr().err
