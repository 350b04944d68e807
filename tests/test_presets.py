"""Every preset on both families: two tasks, stopped inside the second, gone on with; a standard adapter comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pm_llm import ContinualSequence
from pm_llm.adapters.adapter import Adapter
from pm_llm.presets import PRESETS, TESTED
from pm_llm.training.trainers import ContinualDPOTrainer, ContinualSeq2SeqTrainer, ContinualSFTTrainer
from tests.conftest import batch_of, features, small_tasks
from tests.helpers.kinds import CHATS
from tests.helpers.launching import launch, launcher, same_as_one_process
from tests.helpers.presets import sequence

BOTH = [(family, preset) for family, kind in (("llama", "LLaMA"), ("t5", "T5")) for preset in TESTED[kind]]


def goes_on(preset: str, family: str, model: str, folder: Path, whole: dict, kind: str = "embedded", **keys) -> None:
    """Stopped inside the second task and begun again, it does what the run in `whole` did."""
    pairs = kind in ("both", "preference")
    trainer = ContinualDPOTrainer if pairs else ContinualSFTTrainer if family == "llama" else ContinualSeq2SeqTrainer
    original = trainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 2 and parts.session.merger.tasks == 1:
            raise KeyboardInterrupt
        return original(self, *args)

    parts = sequence(preset, model, folder / "parts", kind, **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parts.run()
    resumed = sequence(preset, model, folder / "parts", kind, **keys).run()
    assert resumed["matrix"] == whole["matrix"]
    assert resumed["raw_coefficients"] == whole["raw_coefficients"]
    one, other = (load_file(folder / which / "adapter/adapter_model.safetensors") for which in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def same_on_another_device(family: str, preset: str, forker, model: str, folder: Path) -> None:
    """On `twin` (:mod:`tests.helpers.twin`) it does what the run in `whole` did on the CPU, to rounding."""
    ended = forker("tests/helpers/twin_script.py", "twin", folder / "twin", model, preset, what="script")
    assert ended.status == 0, ended.said
    one, other = (json.loads((folder / x / "results.json").read_text()) for x in ("whole", f"twin/{preset}"))
    assert one["matrix"] == other["matrix"]
    assert one["raw_coefficients"] == pytest.approx(other["raw_coefficients"], rel=1e-5)
    if (family, preset) == ("t5", "coso"):
        return  # past tasks span all inputs of T5's first decoder block here: rounding is left, and Adam scales it up
    one, other = (Adapter.load(folder / x / "adapter").factors for x in ("whole", f"twin/{preset}"))
    for name in one:
        assert (one[name].dense() - other[name].dense()).norm() <= 1e-4 * one[name].dense().norm(), name


@pytest.mark.parametrize(("family", "preset"), BOTH)
def test_trains_goes_on_and_leaves_a_standard_adapter(
    family: str, preset: str, forker, pico_folders, tmp_path
) -> None:
    model = pico_folders[family]
    whole = sequence(preset, model, tmp_path / "whole").run()
    if family == "llama" or PRESETS[preset].constrain:  # what a merge alone remembers is no other on T5
        goes_on(preset, family, model, tmp_path, whole)
        same_on_another_device(family, preset, forker, model, tmp_path)
    found = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    assert any(bool(x.any()) for name, x in found.items() if "lora_B" in name)

    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    alone = PeftModel.from_pretrained(auto.from_pretrained(model), str(tmp_path / "whole/adapter"))
    with torch.no_grad():
        assert torch.isfinite(alone(**batch_of(family, features(family, 2))).logits).all()


OF_ROWS = ("pm", "pm_curvature", "ewc", "coso", "frank_wolfe", "replay")  # gone on with on all kinds of rows


@pytest.mark.parametrize("preset", TESTED["LLaMA"])
def test_trains_on_raw_text_and_on_pairs(preset: str, pico_folders, tmp_path) -> None:
    kinds = ("mixed", "preference") if PRESETS[preset].says("old_data") else ("both",)
    for kind in kinds:
        whole = sequence(preset, pico_folders["llama"], tmp_path / kind / "whole", kind).run()
        assert whole["matrix"][-1][0] > (1 if kind != "preference" else -1)  # a perplexity
        assert 0 <= whole["matrix"][-1][1] <= 100
        if preset in OF_ROWS:
            goes_on(preset, "llama", pico_folders["llama"], tmp_path / kind, whole, kind)


@pytest.mark.parametrize("kind", ["text", "preference", "prompt", "turns"])
def test_every_kind_of_rows_goes_on(kind: str, pico_folders, tmp_path) -> None:
    keys = {"train.packing": True, "max_length": 64} if kind in ("prompt", "turns") else {"fisher.labels": "sampled"}
    model = pico_folders["llama"]
    if kind == "turns":
        model = shutil.copytree(model, tmp_path / "model")
        (model / "chat_template.jinja").write_text(CHATS)
    whole = sequence("pm_curvature", str(model), tmp_path / "whole", kind, **keys).run()
    goes_on("pm_curvature", "llama", str(model), tmp_path, whole, kind, **keys)


@pytest.mark.parametrize(
    "preset", ["pm_curvature", "ewc", "inflora", "coso", "frank_wolfe", "replay", "pissa", "corda"]
)
def test_restarting_from_a_task_repeats_it(preset: str, pico_folders, tmp_path) -> None:
    """From what the constraints and the merge remembered after the task before."""
    keys = {}
    if preset == "corda":  # no preset of its own
        preset, keys = "pm_gaussian", {"start": {"name": "subspace", "init": "corda"}, "constrain": "none"}
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    whole = sequence(preset, pico_folders["llama"], tmp_path / "run", **keys).run()
    before = load_file(file)
    config = sequence(preset, pico_folders["llama"], tmp_path / "run", **keys).config
    again = ContinualSequence(config, small_tasks("sentiment", "topic", train=12, test=2), restart_from="topic")
    assert len(again.run()["stages"]) == 2
    assert again.run_dir.results().matrix == whole["matrix"]
    assert all(torch.equal(x, before[name]) for name, x in load_file(file).items())


@pytest.mark.parametrize("preset", TESTED["4-bit"])
def test_trains_on_a_base_in_4_bits(preset: str, pico_folders, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    run = sequence(preset, pico_folders["llama"], tmp_path / "run", load_in_4bit=True)
    results = run.run()
    assert all(0 <= score <= 100 for score in results["matrix"][-1])
    found = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all(torch.isfinite(x).all() for x in found.values())
    assert any(bool(x.any()) for name, x in found.items() if "lora_B" in name)
    assert all("lora_" in name or not p.requires_grad for name, p in run.session.model.named_parameters())


@pytest.mark.slow
def test_two_processes_do_as_one(forker, pico_folders, tmp_path) -> None:
    presets = [*TESTED["DDP"], "pm_curvature:text", "pm_curvature:preference"]
    command = launcher("ddp_cpu", tmp_path, "tests/helpers/presets_script.py")
    ended = launch(forker, [*command, pico_folders["llama"], str(tmp_path / "two"), *presets])
    assert ended.status == 0, ended.said
    for preset in presets:
        name, _, kind = preset.partition(":")
        sequence(name, pico_folders["llama"], tmp_path / "one" / preset, kind or "embedded").run()
        same_as_one_process(tmp_path / "two" / preset, tmp_path / "one" / preset)
