"""Sequences: named, given, random, recurring, with blurred boundaries."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from pm_llm.cli import main
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.matrix import Matrix
from pm_llm.run.record import Results
from pm_llm.sequence import ContinualSequence
from pm_llm.session import Watcher
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.loading import load_tasks
from pm_llm.tasks.order import blurred, pick_order
from tests.conftest import small_tasks
from tests.helpers.runs import config_for
from tests.helpers.stops import stopping

ORDERS = {"first": ["a", "b", "c", "d"], "second": ["d", "c"]}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, ["a", "b", "c", "d"]),
        ("second", ["d", "c"]),
        ("b,a,b", ["b", "a", "b"]),
        (["c"], ["c"]),
    ],
)
def test_orders(order, expected: list[str]) -> None:
    assert pick_order(order, ORDERS, "abcd") == expected


def test_random_orders() -> None:
    found = [pick_order(f"random:{seed}", ORDERS, "abcd") for seed in range(20)]
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in found)
    assert len({tuple(names) for names in found}) > 5
    assert found[3] == pick_order("random:3", ORDERS, "abcd")
    assert sorted(pick_order("random:3:second", ORDERS, "abcd")) == ["c", "d"]
    assert ORDERS["first"] == ["a", "b", "c", "d"]
    assert pick_order("random_forest,a", ORDERS, ["random_forest", "a"]) == ["random_forest", "a"]
    assert pick_order("a, b", ORDERS, "abcd") == ["a", "b"]
    for wrong in ("random", "random:x", "random:1:third", 5, True, [], [1]):
        with pytest.raises(PmLlmError):
            pick_order(wrong, ORDERS, "abcd")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_blurred_boundaries(share: float) -> None:
    tasks = small_tasks("sentiment", "topic", "question", train=40)
    rows = [{id(row) for row in task.train} for task in tasks]
    mixed = blurred(tasks, share, seed=0)
    for i, task in enumerate(mixed):
        foreign = dict(task.foreign)
        assert set(foreign) == {tasks[j].name for j in (i - 1, i + 1) if 0 <= j < 3}
        assert len(task.train) == 40 - round(share * 40)
        assert sum(map(len, foreign.values())) == round(share * 40)
        assert all(id(row) in rows[i] for row in task.train)
        for j in (i - 1, i + 1):
            if 0 <= j < 3:
                assert all(id(row) in rows[j] for row in foreign[tasks[j].name])
                assert len(foreign[tasks[j].name]) == round(share * 40) // len(foreign)
        assert (task.test, task.whole) == (tasks[i].test, tasks[i].train)
    assert blurred(tasks, share, seed=0) == mixed
    assert blurred(tasks, share, seed=1) != mixed
    assert blurred(tasks, 0, seed=0) == tasks


def test_own_tasks_in_random_order_and_repeated(tmp_path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("prompt,completion\n" + "x,y\n" * 12)
    config = RunConfig(tasks=[str(tmp_path)], order="random:5", repeat=2)
    names = [task.name for task in load_tasks(config)]
    assert sorted(names[:3]) == ["a", "b", "c"]
    assert names[:3] == names[3:]


def test_a_recurring_sequence_runs_and_goes_on(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run", order=["sentiment", "topic"], repeat=2, blur=0.25)
    results = ContinualSequence(config).run()
    assert results["stages"] == ["sentiment", "topic"] * 2
    assert results["tasks"] == ["sentiment", "topic"]
    assert [[x is not None for x in row] for row in results["matrix"]] == [[True, False], *[[True, True]] * 3]
    assert len(results["coefficients"]) == 4
    assert sorted(p.name for p in (tmp_path / "run/stages").iterdir()) == [
        "01-sentiment",
        "02-topic",
        "03-sentiment",
        "04-topic",
    ]
    assert ContinualSequence(config).run() == results


WAYS = [{"evaluate": "final"}, {"evaluate": "diagonal+final"}, {"evaluate": "all"}, {"repeat": 2, "blur": 0.25}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_stopped_in_any_way_of_measuring(way: dict, stop: int, pico_folders, tmp_path) -> None:
    """Stopped before stage 1 (after the untrained model was scored), 2 or 3, and begun again: the same results."""

    def config(name: str):
        return config_for(pico_folders["llama"], tmp_path / name, **{**way, "train.max_steps": 2})

    whole = ContinualSequence(config("whole")).run()
    stopped = ContinualSequence(config("parts"))
    with stopping("run", stop + 1), pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = ContinualSequence(config("parts")).run()
    same = ("matrix", "untrained", "stages", "tasks", "coefficients", "truncation_errors", "average_accuracy")
    assert {key: again[key] for key in same} == {key: whole[key] for key in same}


def test_foreign_rows_are_trained_on_with_their_own_tasks_frame(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run", blur=0.5, **{"train.max_steps": 1})
    seen = []

    class Rows(Watcher):
        def measured(self, stage) -> None:
            seen.append(stage.rows)

    sequence = ContinualSequence(config, watchers=[Rows()])
    sequence.run()
    for task, rows in zip(sequence.tasks, seen, strict=True):
        expected = sequence.encoders[task.name].features(task.train)
        for name, foreign in task.foreign:
            expected += sequence.encoders[name].features(foreign)
        assert len(task.foreign) in (1, 2)
        assert rows == expected
    ContinualSequence(config, load_tasks(config))  # foreign labels are no mistake


def test_probes_are_scored_and_never_trained(pico_folders, tmp_path, capsys) -> None:
    """FUAR from a run: what was known before, between, and what the last task changes and brings."""
    rows = {name: make_task(name, 2, 6).test for name in ("intent", "puzzle")}
    for name, examples in rows.items():
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in examples]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    probes = [str(tmp_path / "intent.jsonl"), {"data": str(tmp_path / "puzzle.jsonl"), "scorer": "token_f1"}]
    roles = {"kept": ["intent", "sentiment"], "updated": "puzzle", "acquired": "topic"}
    overrides = {"order": ["sentiment", "topic"], "probes": probes, "evaluate": "all", "fuar": roles}
    sequence = ContinualSequence(config_for(pico_folders["llama"], tmp_path / "run", **overrides))
    results = sequence.run()
    assert results["tasks"] == ["sentiment", "topic", "intent", "puzzle"]
    assert results["stages"] == ["sentiment", "topic"]
    assert results["test_rows"] == [4, 4, 4, 4]
    assert all(x is not None for row in results["matrix"] for x in row)
    assert results["untrained"].keys() == set(results["tasks"])
    matrix = Matrix.from_results(Results.of(results))
    assert results["fuar"] == matrix.fuar(**roles)
    assert results["average_accuracy"] == pytest.approx((matrix.get(1, 0) + matrix.get(1, 1)) / 2)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "FUAR: " in capsys.readouterr().out
    (tmp_path / "many").mkdir()
    for name in ("sentiment", "puzzle"):  # of which one is a task's
        shutil.copy(tmp_path / "puzzle.jsonl", tmp_path / f"many/{name}.jsonl")
    for wrong, said in (
        ({"fuar": {**roles, "updated": "nothing"}}, "unknown task of fuar 'nothing'"),
        ({"fuar": {**roles, "kept": ["intent"]}}, "a kept task for each of 2 states"),
        ({"fuar": {"kept": "intent"}}, "it names kept"),
        ({"evaluate": "seen"}, "set evaluate to all"),
        ({"probes": [*probes, probes[0]]}, "a probe has the name"),
        ({"probes": [str(tmp_path / "many")]}, "a probe has the name"),
    ):
        with pytest.raises(PmLlmError, match=said):
            ContinualSequence(config_for(pico_folders["llama"], tmp_path / "other", **{**overrides, **wrong}))


def test_probes_are_known_to_every_command(pico_folders, tmp_path, capsys) -> None:
    rows = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in make_task("puzzle", 2, 6).test]
    path = tmp_path / "puzzle.jsonl"
    path.write_text("\n".join(rows))
    common = ["--model", pico_folders["llama"], "--benchmark", "embedded", "--order", "topic", "--max_length", "96"]
    common += ["--max_train_samples", "8", "--max_test_samples", "5", "--probes", str(path)]
    assert main(["tasks", "check", *common]) == 0
    said = capsys.readouterr().out
    assert "sequence: topic\n" in said
    assert re.search(r"puzzle, never trained: .*\n  test: 5 rows", said)
    assert main(["evaluate", *common]) == 0
    topic, puzzle, mean = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert [line[0] for line in (topic, puzzle, mean)] == ["topic", "puzzle", "mean"]
    assert [line[3] for line in (topic, puzzle, mean)] == ["5 rows"] * 3
    assert topic[1] == mean[1]
    path.write_text("nothing")
    for command in (["tasks", "check"], ["doctor"], ["evaluate"]):
        assert main([*command, *common]) != 0
        found = capsys.readouterr()
        assert f"{path}:1" in found.out + found.err


def test_check_tells_what_neighbours_give(pico_folders, capsys) -> None:
    words = ["tasks", "check", "--model", pico_folders["llama"], "--benchmark", "embedded", "--order", "topic,intent"]
    assert main([*words, "--max_train_samples", "20", "--blur", "0.25", "--max_length", "96"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"topic: .*\n  train: 15 rows.*\n.*\n.*\n.* carry loss .*\n    and 5 rows of intent\n", said)


def test_numbers_of_a_recurring_sequence() -> None:
    rows = [[50.0, None], [30.0, 60.0], [55.0, 40.0], [45.0, 70.0]]
    m = Matrix.from_rows(["a", "b"], rows, ["a", "b", "a", "b"])
    m.set(-1, "a", 10.0)
    m.set(-1, "b", 20.0)
    m.set(0, "b", 25.0)
    assert m.average_accuracy() == pytest.approx(57.5)
    assert m.average_over_time() == pytest.approx((50 + 45 + 47.5 + 57.5) / 4)
    assert m.backward_transfer() == pytest.approx(45 - 55)  # a was last learned at the third stage
    assert m.forgetting() == pytest.approx(55 - 45)
    assert m.plasticity() == pytest.approx((50 + 60 + 55 + 70) / 4)
    assert m.forward_transfer() == pytest.approx(25 - 20)
