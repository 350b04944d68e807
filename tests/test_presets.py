"""Every preset on both families: two tasks, stopped inside the second, gone on with; a standard adapter comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pm_llm import ContinualSequence
from pm_llm.config import load_config
from pm_llm.methods import PRESETS
from pm_llm.trainer import ContinualSeq2SeqTrainer, ContinualSFTTrainer
from tests.conftest import FAMILIES, batch_of, features, small_tasks

KEYS = {
    "lora.r": 4,
    "train.learning_rate": 1e-2,
    "train.per_device_train_batch_size": 4,
    "train.max_steps": 3,
    "train.save_steps": 1,
    "fisher.samples": 4,
    "max_new_tokens": 1,
    "evaluate": "final",
}


def sequence(preset: str, model: str, folder: Path) -> ContinualSequence:
    config = load_config(None, {**KEYS, "model": model, "method": preset, "output_dir": str(folder)})
    return ContinualSequence(config, small_tasks("sentiment", "topic", train=12, test=2))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_goes_on_and_leaves_a_standard_adapter(family: str, preset: str, pico_folders, tmp_path) -> None:
    model = pico_folders[family]
    whole = sequence(preset, model, tmp_path / "whole").run()
    trainer = ContinualSFTTrainer if family == "llama" else ContinualSeq2SeqTrainer
    original = trainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 2 and len(parts.stages) == 1:
            raise KeyboardInterrupt
        return original(self, *args)

    parts = sequence(preset, model, tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parts.run()
    resumed = sequence(preset, model, tmp_path / "parts").run()
    assert resumed["matrix"] == whole["matrix"]
    assert resumed["raw_coefficients"] == whole["raw_coefficients"]
    files = [tmp_path / which / "adapter/adapter_model.safetensors" for which in ("whole", "parts")]
    one, other = (load_file(file) for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(bool(x.any()) for name, x in one.items() if "lora_B" in name)

    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    alone = PeftModel.from_pretrained(auto.from_pretrained(model), str(tmp_path / "whole/adapter"))
    with torch.no_grad():
        assert torch.isfinite(alone(**batch_of(family, features(family, 2))).logits).all()
