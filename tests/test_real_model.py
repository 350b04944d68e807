"""The whole loop on a real 135M LLaMA and real benchmark rows, a few steps in bfloat16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pm_llm import ContinualSequence
from pm_llm.adapters.adapter import Adapter
from pm_llm.config import load_config
from tests.conftest import ROOT, SHARED


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(SHARED / "models/assemble.py"), str(out)], check=True, capture_output=True)
    return out


@pytest.mark.slow
@pytest.mark.shared
def test_two_tasks(smollm2: Path, tmp_path) -> None:
    overrides = {"model": str(smollm2), "data_dir": str(SHARED / "data/olora_subset"), "order": ["agnews", "SST-2"]}
    overrides |= {"output_dir": str(tmp_path / "run"), "train.max_steps": 4, "max_test_samples": 6, "max_length": 128}
    overrides |= {"max_train_samples": 16, "fisher.samples": 4, "lora.layers_to_transform": [28, 29]}
    overrides |= {"train.per_device_train_batch_size": 2, "train.logging_steps": 1}
    config = load_config(ROOT / "recipes/standard_cl/smollm2_135m_cpu.yaml", overrides)
    results = ContinualSequence(config).run()
    assert 0 <= results["coefficients"][1] <= 1
    adapter = Adapter.load(tmp_path / "run/adapter")
    assert len(adapter.factors) == 4
    assert adapter.rank == 16
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), str(tmp_path / "run/adapter"))
    loaded = Adapter.from_model(model, "default")
    for name, x in adapter.factors.items():
        torch.testing.assert_close(loaded.factors[name].dense(), x.dense(), atol=1e-6, rtol=1e-4)
        assert x.dense().abs().max() > 0
