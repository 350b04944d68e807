"""`pm-llm quickstart`: what it tells holds over seeds, on both families, and fits a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pm_llm.commands.quickstart import METHODS, train
from tests.conftest import ROOT

SEEDS = range(int(os.environ.get("PM_LLM_SEEDS", "0")))  # `make seeds` takes five


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_forgetting_is_seen_and_cured(model: str, seed: int, tmp_path) -> None:
    found = {m: train(m, model, str(tmp_path / m), seed) for m in ("seqlora", "pm_curvature")}
    plain, cured = (found[method].numbers["average_accuracy"] for method in ("seqlora", "pm_curvature"))
    assert cured >= plain + 15, (plain, cured)
    assert found["seqlora"].numbers["plasticity"] > 85  # it had learnt them


@pytest.mark.slow
def test_the_command(tmp_path) -> None:
    """All four runs, in a folder of one's own."""
    command = [sys.executable, "-m", "pm_llm", "quickstart", "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no notice of a library
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(label) for line in lines) for label in METHODS.values())
    ends = {m: int(line.split()[-1]) for m, label in METHODS.items() for line in lines if line.startswith(label)}
    assert ends["pm_curvature"] >= ends["seqlora"] + 15
    assert ends["joint"] >= 90
    assert "Plain fine-tuning had learnt its tasks to" in done.stdout
    for name in ("picture", "page", "adapter"):
        (path,) = [line.split()[1] for line in lines if line.startswith(name)]
        assert (tmp_path / path).exists()


def test_what_the_docs_say_of_it(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quickstart

    found = json.loads((ROOT / "docs/results/quickstart.json").read_text())
    page = (ROOT / "docs/results.md").read_text()
    assert quickstart.table(found) in page
    leads = [
        found[f"{model} pm_curvature {seed}"]["average"] - found[f"{model} seqlora {seed}"]["average"]
        for model in ("llama", "t5")
        for seed in range(5)
    ]
    assert min(leads) >= 15
    assert f"by {min(leads):.0f} to {max(leads):.0f} points" in page
