"""The gate: what earlier tasks and probes lost, what the last task gained, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pm_llm import ContinualSequence, PmLlmError, Task
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.intervals import paired_difference
from pm_llm.evaluation.predictions import Predictions
from pm_llm.report.data import Run, open_run
from pm_llm.report.gate import judge, status_of
from pm_llm.run.record import Results
from tests.helpers.presets import KEYS

ROWS = 100


def said(task: str, right: int, rows: int = ROWS) -> Predictions:
    """Of so many rows, the first are right."""
    answers = ["yes"] * right + ["no"] * (rows - right)
    return Predictions(task, "exact_match", answers, [["yes"]] * rows, [None] * rows, [str(i) for i in range(rows)])


def text(task: str, nats: float) -> Predictions:
    return Predictions(
        task, "perplexity", [nats * 10] * ROWS, [[10, 40]] * ROWS, [None] * ROWS, list(map(str, range(ROWS)))
    )


def run_of(predictions: dict[int, dict[str, Predictions]], stages: list[str], **more) -> Run:
    tasks = list(dict.fromkeys([*stages, *(name for one in predictions.values() for name in one)]))
    scorers = [next(x[name].scorer for x in predictions.values() if name in x) for name in tasks]
    rows = [
        [predictions[i][n].score() if n in predictions.get(i, {}) else None for n in tasks] for i in range(len(stages))
    ]
    results = Results({"method": "pm"}, {}, tasks, stages, rows, [1.0] * len(stages), scorers=scorers, **more)
    return Run(Path("run"), "pm", results, [], predictions)


def test_a_loss_beyond_its_noise_breaks_the_gate() -> None:
    run = run_of({0: {"a": said("a", 80)}, 1: {"a": said("a", 60), "b": said("b", 70)}}, ["a", "b"])
    (one,) = judge(run, lose=2)
    assert (one.task, one.what, one.unit, one.broken) == ("a", "lost", "points", True)
    assert one.change == pytest.approx(20.0)
    expected = paired_difference([run.predictions[0]["a"]], [run.predictions[1]["a"]])
    assert (one.low, one.high) == (expected.low, expected.high)
    assert status_of([one]) == 3
    assert "LOST a: 80.0 -> 60.0, lost 20.0 points" in one.line()


def test_a_loss_within_its_noise_does_not() -> None:
    few = run_of({0: {"a": said("a", 4, 5)}, 1: {"a": said("a", 3, 5), "b": said("b", 3, 5)}}, ["a", "b"])
    (one,) = judge(few, lose=2)
    assert one.change == 20.0
    assert one.low <= 2
    assert status_of([one]) == 0
    assert one.line().startswith("kept a")


def test_a_perplexity_is_judged_in_percent() -> None:
    run = run_of({0: {"t": text("t", 1.0)}, 1: {"t": text("t", 1.1), "b": said("b", 50)}}, ["t", "b"])
    (one,) = judge(run, lose=5)
    assert one.unit == "percent"
    assert one.change == pytest.approx(10.517, abs=1e-3)
    assert one.broken
    assert (
        status_of(
            judge(run_of({0: {"t": text("t", 1.1)}, 1: {"t": text("t", 1.0), "b": said("b", 5)}}, ["t", "b"]), 0)
        )
        == 0
    )


def test_probes_are_guarded_against_what_was_before_training() -> None:
    run = run_of({-1: {"p": said("p", 90)}, 0: {"a": said("a", 80), "p": said("p", 50)}}, ["a"], untrained={"p": 90.0})
    (one,) = judge(run, lose=2)
    assert (one.task, one.broken) == ("p", True)


def test_the_last_task_must_have_gained() -> None:
    stages, before = ["a", "b"], {"a": said("a", 80), "b": said("b", 50)}
    for after, status in ((70, 0), (53, 4), (50, 4)):
        found = judge(run_of({0: before, 1: {"a": said("a", 80), "b": said("b", after)}}, stages), 2, 5)
        assert status_of(found) == status
    found = judge(run_of({0: before, 1: {"a": said("a", 20), "b": said("b", 50)}}, stages), 2, 5)
    assert status_of(found) == 3
    with pytest.raises(PmLlmError, match=r"'b' was not scored before it was trained\. Set evaluate to all"):
        judge(run_of({0: {"a": said("a", 80)}, 1: {"a": said("a", 80), "b": said("b", 50)}}, stages), 2, 5)


def test_of_a_run(tmp_path, capsys) -> None:
    rows = [{"prompt": f"is {i} even ?", "completion": "yes"} for i in range(12)]
    tasks = [Task.from_rows(name, rows, rows[:4]) for name in ("one", "two")]
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run"), "evaluate": "seen"}
    ContinualSequence(load_config(None, keys), tasks).run()
    capsys.readouterr()
    status = main(["gate", str(tmp_path / "run"), "--lose", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == status == status_of(judge(open_run(tmp_path / "run"), 2))
    assert [one["task"] for one in found["verdicts"]] == ["one"]
    assert main(["gate", str(tmp_path / "run"), "--lose", "100"]) == 0
    said = capsys.readouterr().out
    assert "kept one" in said
    assert "-0.0" not in said
    assert main(["gate", str(tmp_path / "run"), "--lose", "-1"]) == 2
    keys |= {"evaluate": "final", "output_dir": str(tmp_path / "final")}
    ContinualSequence(load_config(None, keys), tasks).run()
    assert main(["gate", str(tmp_path / "final")]) == 2
    assert "no predictions on 'one' after 'one' are kept" in capsys.readouterr().err
