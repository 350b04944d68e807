"""Real processes that are killed, and what must be true of a run's folder whenever that happens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pm_llm.adapters.adapter import Adapter
from tests.conftest import FAMILIES

# how many kills a family; `make faults` draws many
KILLS = int(os.environ.get("PM_LLM_KILLS", "4"))
TASKS = ("sentiment", "topic", "question")


def arguments(model: str, **more: object) -> list[str]:
    """A run of three tasks with several checkpoints in each, ending between epochs, on a pico model."""
    keys: dict[str, object] = {"model": model, "benchmark": "embedded", "order": ",".join(TASKS)}
    keys |= {"max_train_samples": 24, "max_test_samples": 4, "max_length": 96, "fisher.samples": 6}
    keys |= {"train.max_steps": 5, "train.learning_rate": 0.01, "train.logging_steps": 1, "lora.r": 4}
    keys |= {"train.per_device_train_batch_size": 8, "train.save_steps": 2, "max_rank": 6, **more}
    return ["run", *(str(word) for key, value in keys.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="session")
def whole(forker, pico_folders, tmp_path_factory) -> dict[str, Path]:
    """An uninterrupted run of each family."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp("whole") / family
        ended = forker(*arguments(pico_folders[family]), "--output_dir", found[family])
        assert ended.status == 0, ended.said
    return found


def same_outcome(run: Path, reference: Path) -> None:
    """Final adapter, matrix and coefficients are bit-identical."""
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, reference))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (run, reference))
    for key in (
        "matrix",
        "coefficients",
        "raw_coefficients",
        "module_coefficients",
        "truncation_errors",
        "curvatures",
    ):
        assert one[key] == other[key], key


def every_adapter_loads(run: Path) -> int:
    """Of all that a folder holds under their final names; their number."""
    found = [path.parent for path in run.rglob("adapter_config.json") if "/." not in path.as_posix()]
    found += [run / "adapter"] if (run / "adapter").exists() else []
    for folder in found:
        Adapter.load(folder)
    return len(found)
