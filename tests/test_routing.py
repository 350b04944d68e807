"""Routing among task adapters, as an alternative to merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pm_llm import ContinualSequence
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.routing import route
from pm_llm.evaluation.run import evaluate_adapter
from tests.conftest import FAMILIES


def rows(path: Path, words: str, count: int = 16) -> str:
    """A task whose prompts have words of their own."""
    names = words.split()
    found = [
        {"prompt": " ".join(names[(i + k) % len(names)] for k in range(6)), "completion": names[i % 2]}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_is_answered_by_the_adapter_it_was_sent_to(family: str, tmp_path, capsys) -> None:
    tasks = [
        rows(tmp_path / "colour.jsonl", "red green blue yellow"),
        rows(tmp_path / "number.jsonl", "one two six ten"),
    ]
    keys = {"model": f"embedded:{family}", "tasks": [{"data": t, "test_size": 0.5} for t in tasks]}
    keys |= {"method": "per_task", "max_length": 96, "train.max_steps": 8, "train.learning_rate": 1e-2}
    keys |= {"evaluate": "final", "output_dir": str(tmp_path / "run")}
    config = load_config(None, keys)
    ContinualSequence(config).run()
    found = route(str(tmp_path / "run"))
    assert sum(found.right) / 2 > 0.7
    folders = sorted((tmp_path / "run/stages").glob("*/task_adapter"))
    alone = [evaluate_adapter(str(folder), config) for folder in folders]
    for task, (said, sent) in enumerate(zip(found.predictions, found.sent, strict=True)):
        assert said.keys == alone[0][task].keys
        assert list(said.predictions) == [alone[place][task].predictions[i] for i, place in enumerate(sent)]
        assert found.right[task] == sum(place == task for place in sent) / len(sent)
    assert found.kept_bytes > sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    capsys.readouterr()
    assert main(["route", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "routed right" in out
    assert "kept: " in out


def test_adapters_that_build_on_each_other_are_refused(tmp_path, capsys, pico_folders) -> None:
    keys = {"model": pico_folders["llama"], "benchmark": "embedded", "order": "sentiment,topic", "method": "inclora"}
    keys |= {"max_train_samples": 8, "max_test_samples": 2, "max_length": 96, "train.max_steps": 1}
    ContinualSequence(load_config(None, {**keys, "evaluate": "final", "output_dir": str(tmp_path / "run")})).run()
    assert main(["route", str(tmp_path / "run")]) == 2
    assert "build on each other" in capsys.readouterr().err
