"""The gate: what earlier tasks and probes lost, what the last task gained, and the exit status."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from pm_llm import ContinualSequence, PmLlmError, Task
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.intervals import paired_difference, swap_test
from pm_llm.evaluation.predictions import Predictions
from pm_llm.report.gate import Course, GateError, judge, status_of
from pm_llm.run.folder import RunDir
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


def run_of(predictions: dict[int, dict[str, Predictions]], stages: list[str]) -> Course:
    return Course(Path("run"), stages, predictions)


def test_a_loss_beyond_its_noise_breaks_the_gate() -> None:
    run = run_of({0: {"a": said("a", 80)}, 1: {"a": said("a", 60), "b": said("b", 70)}}, ["a", "b"])
    (one,) = judge(run, lose=2)
    assert (one.task, one.what, one.unit, one.broken) == ("a", "lost", "points", True)
    assert one.change == pytest.approx(20.0)
    expected = paired_difference([run.predictions[0]["a"]], [run.predictions[1]["a"]], 4000)
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
    run = run_of({-1: {"p": said("p", 90)}, 0: {"a": said("a", 80), "p": said("p", 50)}}, ["a"])
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
    assert found["status"] == status == status_of(judge(Course.of(RunDir.open(tmp_path / "run")), 2))
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


def gated(folder: Path, **keys) -> ContinualSequence:
    """Two tasks of other answers to the same prompts, so that the second undoes the first."""
    first = [{"prompt": f"is {i} even ?", "completion": "red"} for i in range(24)]
    second = [{"prompt": f"is {i} even ?", "completion": "blue"} for i in range(24)]
    tasks = [Task.from_rows("one", first, first), Task.from_rows("two", second, second)]
    given = {**KEYS, "method": "seqlora", "output_dir": str(folder), "evaluate": "seen", "train.max_steps": 30}
    return ContinualSequence(load_config(None, {**given, "gate.lose": 2, **keys}), tasks)


def test_a_run_stops_at_its_gate_and_goes_on_when_that_allows_more(tmp_path) -> None:
    for _ in range(2):  # the same command again does not pass either
        with pytest.raises(GateError, match=r"'two' does not pass the gate:\nLOST one: 100\.0 -> ") as stopped:
            gated(tmp_path).run()
        assert stopped.value.status == 3
    assert RunDir.open(tmp_path).results().stages == ["one", "two"]  # the last task: it can be reported
    assert gated(tmp_path, **{"gate.lose": 100}).run()["stages"] == ["one", "two"]
    assert main(["gate", str(tmp_path)]) == 3


def test_a_gate_may_take_the_task_back_or_warn(tmp_path, capsys) -> None:
    with pytest.raises(GateError, match=r"It was taken back: the run is after 'one' again"):
        gated(tmp_path / "back", **{"gate.action": "restore"}).run()
    assert RunDir.open(tmp_path / "back").results().stages == ["one"]
    capsys.readouterr()
    assert gated(tmp_path / "warn", **{"gate.action": "warn"}).run()["stages"] == ["one", "two"]
    assert "LOST one" in capsys.readouterr().out


def test_a_gate_wants_what_it_compares(tmp_path) -> None:
    with pytest.raises(PmLlmError, match="set evaluate to seen"):
        gated(tmp_path, evaluate="final")
    with pytest.raises(PmLlmError, match="keeps a model for each task"):
        gated(tmp_path, method="per_task")
    with pytest.raises(PmLlmError, match=r"gate\.gain is given, and gate\.lose is not"):
        load_config(None, {"gate.gain": 2}).check()


def test_a_first_task_must_gain_too(tmp_path) -> None:
    rows = [{"prompt": f"is {i} even ?", "completion": "red"} for i in range(24)]
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path), "evaluate": "seen"}
    keys |= {"gate.lose": 2, "gate.gain": 5, "train.learning_rate": 1e-9}
    with pytest.raises(GateError, match=r"NOT GAINED one(.|\n)*It is the run's first task and stays") as stopped:
        ContinualSequence(load_config(None, keys), [Task.from_rows("one", rows, rows)]).run()
    assert stopped.value.status == 4


def test_swapping_rows_is_an_exact_test() -> None:
    """Of rows that are right or wrong it is McNemar's: the chance of so many heads."""
    before, after = said("a", 14, 30), said("a", 6, 30)  # 8 rows changed, all one way
    assert swap_test([before], [after], 20_000) == pytest.approx(0.5**8, rel=0.25)
    assert swap_test([after], [before], 2000) == 1.0
    better, worse = text("t", 1.0), text("t", 1.1)  # a perplexity: lower is better
    assert swap_test([better], [worse], 2000) < 0.01
    assert swap_test([worse], [better], 2000) > 0.99


def test_of_runs_that_lost_nothing_few_are_stopped() -> None:
    """Nine skills of 30 rows whose answers are drawn anew, alike before and after."""
    rng, stopped = random.Random(0), 0
    chances = [rng.uniform(0.2, 0.9) for _ in range(9)]

    def drawn(name: str, chance: float) -> Predictions:
        answers = ["yes" if rng.random() < chance else "no" for _ in range(30)]
        return Predictions(name, "exact_match", answers, [["yes"]] * 30, [None] * 30, list(map(str, range(30))))

    for _ in range(100):
        before, after = ({f"s{i}": drawn(f"s{i}", c) for i, c in enumerate(chances)} for _ in range(2))
        stopped += status_of(judge(run_of({-1: before, 0: {"a": said("a", 80), **after}}, ["a"]), 0.0)) != 0
    assert stopped <= 5
    lost = {**after, "s0": said("s0", 0, 30)}
    before["s0"] = said("s0", 18, 30)
    run = run_of({-1: before, 0: {"a": said("a", 80), **lost}}, ["a"])
    assert [one.task for one in judge(run, 2.0) if one.broken] == ["s0"]  # and one that loses a skill is


def test_what_was_not_scored_before_is_not_guarded() -> None:
    run = run_of({0: {"a": said("a", 80), "p": said("p", 50)}}, ["a"])
    assert (judge(run, 2.0), run.not_guarded) == ([], ["p"])


def test_tasks_to_come_are_not_guarded() -> None:
    before = {"a": said("a", 20), "b": said("b", 90)}
    after = {"a": said("a", 80), "b": said("b", 10)}
    run = Course(Path("run"), ["a"], {-1: before, 0: after}, to_come=frozenset({"b"}))
    assert (judge(run, 2.0), run.not_guarded) == ([], [])


def test_general_abilities_are_looked_at_together_too() -> None:
    """Each loses what may be chance; all of them together do not."""
    skills = {f"general.{i}" for i in range(8)}
    before = {name: said(name, 20, 30) for name in skills}
    after = {name: said(name, 15, 30) for name in skills}
    found = judge(run_of({-1: before, 0: {"a": said("a", 80), **after}}, ["a"]), 2.0)
    assert [one.task for one in found if one.broken] == ["mean of the general abilities"]


def test_too_few_rows_are_told() -> None:
    run = run_of({0: {"a": said("a", 4, 4)}, 1: {"a": said("a", 0, 4), "b": said("b", 4, 4)}}, ["a", "b"])
    (one,) = judge(run, 2.0)
    assert not one.broken
    assert run.warnings(0.95) == ["not guarded: a has 4 rows, too few to tell any loss from chance"]
    assert not run_of({0: {"a": said("a", 6, 6)}, 1: {"a": said("a", 0, 6)}}, ["a", "b"]).warnings(0.95)


def test_a_model_that_is_blown_up_does_not_pass() -> None:
    for nats in (math.nan, math.inf):
        run = run_of({0: {"t": text("t", 1.0)}, 1: {"t": text("t", nats), "b": said("b", 50)}}, ["t", "b"])
        assert status_of(judge(run, 5)) == 3


def test_a_gate_that_is_set_later(tmp_path) -> None:
    """What earlier tasks gained was not measured then; what is added is."""
    rows = [{"prompt": f"is {i} even ?", "completion": "red"} for i in range(12)]
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path), "evaluate": "seen", "train.max_steps": 30}
    keys |= {"lora.target_modules": "all-linear"}
    ContinualSequence(load_config(None, keys), [Task.from_rows("one", rows, rows)]).run()
    blue = [{**row, "completion": "blue"} for row in rows]
    opened = ContinualSequence.open(tmp_path, {"gate.lose": 100, "gate.gain": 5})
    assert opened.add(Task.from_rows("two", blue, blue))["stages"] == ["one", "two"]


def test_tasks_with_numbers_for_names_are_taken_back(tmp_path) -> None:
    run = gated(tmp_path, **{"gate.action": "restore"})
    tasks = [replace(task, name=name) for task, name in zip(run.given, ("2", "1"), strict=True)]
    with pytest.raises(GateError, match="It was taken back: the run is after '2' again"):
        ContinualSequence(run.config, tasks).run()
    assert RunDir.open(tmp_path).results().stages == ["2"]


def test_a_run_that_was_stopped_on_its_way_is_reported_and_not_handed_out(tmp_path, capsys) -> None:
    run = gated(tmp_path / "run")
    third = replace(run.given[0], name="three")
    with pytest.raises(GateError, match=r"It stays: take it back with pm-llm restore .* --to 1"):
        ContinualSequence(run.config, [*run.given, third]).run()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "| one | after one | 100.0 | 0.0 |" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--as", "adapter", "--out", str(tmp_path / "out")]) == 3
    assert "does not pass its own gate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    wide = load_config(None, {**run.config.plain(), "gate": {"lose": 100.0}})
    assert ContinualSequence(wide, [*run.given, third]).run()["stages"] == ["one", "two", "three"]
    assert main(["export", str(tmp_path / "run"), "--as", "adapter", "--out", str(tmp_path / "out")]) == 0


def test_fuar_and_a_gate_that_takes_back_do_not_go_together() -> None:
    fuar = {"kept": ["a"], "updated": "a", "acquired": "a"}
    with pytest.raises(PmLlmError, match="none can be taken back"):
        load_config(None, {"fuar": fuar, "evaluate": "all", "gate": {"lose": 1, "action": "restore"}}).check()
