"""The files in `benchmarks/` run and write what they say; how fast they are is asserted nowhere."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from tests.conftest import FAMILIES, ROOT


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation(family: str, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/evaluation.py"), "--model", f"embedded:{family}", "--rows", "24"]
    command += ["--repeats", "2", "--max-length", "150", "--out", str(tmp_path / "found.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == 24
    assert found["different_predictions"] == 0
    assert {name: len(values) for name, values in found["seconds"].items()} == {"plain": 2, "packed": 2, "labels": 2}
    assert "| packed |" in done.stdout


def test_every_file_is_in_the_readme() -> None:
    text = (ROOT / "benchmarks/README.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("step", "--turns 1 --batch 1 --tokens 16", "| plain, running folded |"),
        ("fisher", "--turns 1 --rows 4 --width 64 --model embedded:t5", "| embedded:t5 | factored and exact |"),
        ("fold", "--shapes 7b --peft-modules 0 --repeats 1", "| 7b | 64 |"),
        ("many_tasks", "--tasks 20 --modules 2 --size 64", "| ratio last / first |"),
        ("coefficient", "--seeds 0 --order sentiment,topic --train.max_steps 2", "mean absolute difference"),
        ("overhead", "--rows 16 --samples 4 --turns 1", "| this run | 16 | 4 |"),
        ("fisher_samples", "--samples 2 4 --draws 2 --train.max_steps 2", "| 4 | "),
    ],
)
def test_claims_of_the_core(file: str, words: str, expected: str, tmp_path, monkeypatch, capsys) -> None:
    """In this process: importing everything anew takes longer than most of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [file, *words.split(), "--out", "found.json"])
    runpy.run_path(str(ROOT / f"benchmarks/{file}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_curvature_memory(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/curvature_memory.py"), "--modules", "2", "--size", "64"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["memory", "memory, blocks given back", "disk", "disk, blocks given back"]
    assert "| disk |" in done.stdout
