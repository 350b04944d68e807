"""`pm-llm tune`: which candidate is found, within its time, on rows that are neither trained on nor tested."""

from __future__ import annotations

import json

import pytest

from pm_llm.cli import main
from pm_llm.commands import tune
from pm_llm.commands.tune import Candidate, halve, prepared, rates, seconds
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from tests.helpers.errors import one_line


def test_successive_halving_takes_the_better_half_on(monkeypatch) -> None:
    asked = []

    def score(one: Candidate, config, tasks, share: float) -> float:
        asked.append((one.rate, share))
        return 10 * one.rate + share

    monkeypatch.setattr(tune, "score", score)
    candidates = [Candidate(rate, None) for rate in (1, 2, 3, 4, 5)]
    halve(candidates, None, [], False, float("inf"))
    assert asked == [
        *((r, 0.25) for r in (1, 2, 3, 4, 5)),
        *((r, 0.5) for r in (5, 4, 3)),
        *((r, 1.0) for r in (5, 4)),
    ]
    asked.clear()
    halve([Candidate(rate, None) for rate in (1, 2, 3)], None, [], True, float("inf"))  # a perplexity
    assert asked[-1] == (1, 1.0)
    asked.clear()
    halve([Candidate(rate, None) for rate in (1, 2, 3)], None, [], True, 0)  # no time: one run is made all the same
    assert asked == [(1, 0.25)]


def test_rates_and_times() -> None:
    config = load_config(None, {"train.learning_rate": 1e-3})
    assert rates(config, 3) == [5e-4, 1e-3, 2e-3]
    assert rates(config, 1) == [1e-3]
    assert [seconds(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    with pytest.raises(PmLlmError, match="as in 20m"):
        seconds("20")


def test_rows_that_are_scored_are_not_trained_on(tmp_path) -> None:
    rows = [{"prompt": f"is {i} even ?", "completion": "no" if i % 2 else "yes"} for i in range(40)]
    (tmp_path / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "even.jsonl")
    entries = [data, {"data": data, "name": "again", "validation_size": 0.25}]
    config, tasks, lower = prepared(load_config({"tasks": entries, "general": {"skills": "all"}}), 2)
    assert (config.general.skills, lower) == (None, False)
    for task, scored in zip(tasks, (3, 9), strict=True):
        shown, held = ({row.prompt for row in some} for some in (task.train, task.test))
        assert len(held) == scored
        assert not shown & held


def test_the_command(pico_folders, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [
        "--model",
        pico_folders["llama"],
        "--benchmark",
        "embedded",
        "--max_train_samples",
        "20",
        "--max_length",
        "96",
    ]
    keys += ["--train.max_steps", "4", "--fisher.samples", "4"]
    assert main(["tune", "--rates", "2", "--weights", "0.3", "1", "--first", "1", *keys]) == 0
    said = capsys.readouterr().out
    assert "4 candidates on sentiment, scored on validation rows" in said
    assert said.count("with 25% of the steps") == 4
    assert said.count("with 100% of the steps") == 1
    (last,) = [line for line in said.splitlines() if line.startswith("take --train.learning_rate")]
    assert "--constrain '{name: curvature, weight: " in last
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    one_line(main(["tune", "--budget", "soon", *keys]), capsys.readouterr().err, "--budget is 'soon'")
    one_line(main(["tune", "--rates", "0", *keys]), capsys.readouterr().err, "at least 1")
