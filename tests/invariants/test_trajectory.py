"""Law 4 through the command line: how a batch is split, and what is computed twice, changes no step of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from tests.conftest import FAMILIES


def losses(run: Path) -> list[float]:
    """The training loss of every step of every task."""
    found = []
    for log in sorted(run.glob("stages/*/log.jsonl")):
        found += [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    return found


def same_trajectory(run: Path, other: Path) -> None:
    """Losses step by step, matrix, coefficients and adapters, within float tolerance."""
    one, two = losses(run), losses(other)
    assert one == pytest.approx(two, rel=2e-3)
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (run, other))
    assert a["matrix"] == b["matrix"]
    assert a["raw_coefficients"] == pytest.approx(b["raw_coefficients"], rel=1e-3)
    adapters = [path.relative_to(run) for path in sorted(run.glob("stages/*/*adapter"))]
    assert len(adapters) == 2 * len(a["stages"])
    for which in adapters:
        x, y = (Adapter.load(folder / which).factors for folder in (run, other))
        for name in x:
            assert (x[name].dense() - y[name].dense()).norm() < 1e-3 * y[name].dense().norm(), (which, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_and_checkpointing(family: str, pico_folders, tmp_path) -> None:
    keys: dict[str, object] = {"model": pico_folders[family], "benchmark": "embedded", "order": "sentiment,topic"}
    keys |= {"max_train_samples": 32, "max_test_samples": 5, "max_length": 96, "lora.r": 4, "fisher.samples": 4}
    keys |= {"train.max_steps": 4, "train.learning_rate": 0.01, "train.logging_steps": 1}
    ways: dict[str, dict[str, object]] = {
        "whole": {"train.per_device_train_batch_size": 8},
        "accumulated": {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4},
        "recomputed": {"train.per_device_train_batch_size": 8, "train.gradient_checkpointing": "true"},
    }
    for name, way in ways.items():
        words = [str(word) for key, value in (keys | way).items() for word in (f"--{key}", value)]
        assert main(["run", *words, "--output_dir", str(tmp_path / name)]) == 0
    assert len(losses(tmp_path / "whole")) == 8
    for name in ("accumulated", "recomputed"):
        same_trajectory(tmp_path / name, tmp_path / "whole")
