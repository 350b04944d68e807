"""A run over months: finished tasks are kept in it, a task is added, a stage is restored, a part is removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from pm_llm import stage
from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra import lowrank
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.run.folder import RunDir
from pm_llm.run.record import Results
from pm_llm.run.taking_back import restore
from pm_llm.sequence import ContinualSequence
from tests.conftest import pm_llm, small_tasks
from tests.helpers.tasks import jsonl_tasks


def keys_for(model: str, out: Path, **more: object) -> dict[str, object]:
    keys: dict[str, object] = {"model": model, "output_dir": str(out), "max_length": 96, "fisher.samples": 4}
    keys |= {"train.max_steps": 3, "train.learning_rate": 0.02, "lora.r": 4, "method": "pm_curvature"}
    return {**keys, **more}


def begin(model: str, out: Path, tasks: list[Path], **more: object) -> ContinualSequence:
    return ContinualSequence(load_config(None, keys_for(model, out, tasks=list(map(str, tasks)), **more)))


def words(keys: dict[str, object]) -> list[str]:
    return [str(word) for key, value in keys.items() for word in (f"--{key}", value)]


def copied(folder: Path) -> Path:
    """The run in a folder without its unfinished task."""
    out = Path(shutil.copytree(folder / "run", folder / "copy", symlinks=True))
    with RunDir.open(out).locked():
        restore(RunDir.open(out), "1")
    return out


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def three(pico_folders, tmp_path_factory) -> Path:
    """A finished run of three tasks whose files are gone."""
    root = tmp_path_factory.mktemp("three")
    tasks = jsonl_tasks(root / "tasks", "sentiment", "topic", "question")
    begin(pico_folders["llama"], root / "run", [tasks / n for n in ("sentiment", "topic", "question")]).run()
    shutil.rmtree(tasks)
    return root / "run"


@pytest.fixture
def copy(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run", symlinks=True))


def test_a_folder_of_tasks_empties_while_the_run_goes_on(pico_folders, tmp_path, monkeypatch) -> None:
    model = pico_folders["llama"]
    tasks = jsonl_tasks(tmp_path / "tasks", "question", "sentiment", "topic")
    whole = begin(model, tmp_path / "whole", [tasks]).run()
    begin(model, tmp_path / "run", [tasks / "question"]).run()
    shutil.rmtree(tasks / "question")
    begin(model, tmp_path / "run", [tasks / "question", tasks / "sentiment"]).run()
    shutil.rmtree(tasks / "sentiment")
    results = begin(model, tmp_path / "run", [tasks]).run()  # the folder, in which two of three are missing
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    for key in ("matrix", "test_rows", "coefficients", "average_accuracy", "forgetting"):
        assert results[key] == whole[key], key
    shutil.rmtree(tasks)
    assert begin(model, tmp_path / "run", [tasks]).run()["matrix"] == whole["matrix"]


def test_a_file_that_has_changed_is_told(pico_folders, tmp_path, capsys) -> None:
    model, tasks = pico_folders["llama"], jsonl_tasks(tmp_path / "tasks", "sentiment", "topic")
    first = begin(model, tmp_path / "run", [tasks / "sentiment"]).run()
    place = tasks / "sentiment" / "test.jsonl"
    place.write_text(json.dumps({"prompt": "another ?", "completion": "yes"}))
    capsys.readouterr()
    results = begin(model, tmp_path / "run", [tasks / "sentiment", tasks / "topic"]).run()
    said = capsys.readouterr().out
    assert f"{place} has changed since task 'sentiment' was trained on it" in said
    assert "train.jsonl has changed" not in said
    assert results["test_rows"][0] == first["test_rows"][0] == 4
    other = load_config(
        None, keys_for(model, tmp_path / "run", tasks=[{"data": str(tasks / "sentiment"), "scorer": "rouge_l"}])
    )
    with pytest.raises(PmLlmError, match="'sentiment' is finished, and its scorer or labels are not what they were"):
        ContinualSequence(other)
    begin(model, tmp_path / "run", [tasks / "sentiment", tasks / "topic"], max_test_samples=2).run()
    assert "max_test_samples None -> 2 acts on tasks that follow" in capsys.readouterr().out


def test_nothing_but_scores_is_kept(pico_folders, tmp_path, capsys) -> None:
    model, tasks = pico_folders["llama"], jsonl_tasks(tmp_path / "tasks", "sentiment", "topic", "question")
    names = [tasks / "sentiment", tasks / "topic", tasks / "question"]
    off = {"keep_test_rows": False}
    secret = json.loads((names[0] / "test.jsonl").read_text().splitlines()[0])["prompt"].splitlines()[1]
    whole = begin(model, tmp_path / "whole", names, **off).run()
    begin(model, tmp_path / "run", names[:1], **off).run()
    shutil.rmtree(names[0])
    results = begin(model, tmp_path / "run", names, **off).run()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert results["matrix"] == whole["matrix"]
    gaps = [[x is None for x in row] for row in results["matrix"]]
    assert gaps == [[False, True, True], [True, False, True], [True, True, False]]
    assert "plasticity" in results
    assert "average_accuracy" not in results
    held = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in held if secret.encode() in path.read_bytes()]
    for command in ("report", "status"):
        assert main([command, str(tmp_path / "run")]) == 0
    assert "keep_test_rows is false" in capsys.readouterr().out
    assert main(["score", str(tmp_path / "run")]) == 2
    assert "holds no predictions: keep_test_rows is false" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "run"), "user/name", "--dry-run", "--base-model", "org/base"]) == 0


def test_killed_before_rows_are_forgotten(pico_folders, tmp_path, monkeypatch) -> None:
    """The rows of a task are there until it is scored, also when nothing else of it is."""
    model, tasks = pico_folders["llama"], jsonl_tasks(tmp_path / "tasks", "sentiment")
    sequence = begin(model, tmp_path / "run", [tasks / "sentiment"], keep_test_rows=False)
    monkeypatch.setattr("pm_llm.session.answer_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sequence.run()
    monkeypatch.undo()
    shutil.rmtree(tasks)
    results = begin(model, tmp_path / "run", [tasks / "sentiment"], keep_test_rows=False).run()
    assert results["matrix"][0][0] is not None
    assert not list((tmp_path / "run").rglob("test_rows.jsonl"))


def test_adding_is_as_if_it_had_been_there(pico_folders, tmp_path, capsys, monkeypatch) -> None:
    model, tasks = pico_folders["llama"], jsonl_tasks(tmp_path / "tasks", "sentiment", "topic", "question")
    names = [tasks / "sentiment", tasks / "topic", tasks / "question"]
    begin(model, tmp_path / "whole", names).run()
    begin(model, tmp_path / "run", names[:1]).run()
    shutil.rmtree(names[0])
    assert main(["add", str(tmp_path / "run"), str(names[1])]) == 0
    shutil.rmtree(names[1])
    results = ContinualSequence.open(tmp_path / "run").add(str(names[2]))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert results["stages"] == ["sentiment", "topic", "question"]
    capsys.readouterr()
    assert main(["add", str(tmp_path / "run"), str(names[2])]) == 2
    assert "task 'question' is in" in capsys.readouterr().err
    (more,) = small_tasks("puzzle")  # a task made in Python, at another learning rate
    monkeypatch.setattr("pm_llm.stage.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ContinualSequence.open(tmp_path / "run", {"train.learning_rate": 1e-3}).add(more)
    monkeypatch.undo()
    results = ContinualSequence.open(tmp_path / "run").add(more)  # with what it was begun with
    assert results["stages"][-1] == "puzzle"
    assert results["config"]["train"]["learning_rate"] == 1e-3
    assert any("train.learning_rate" in line for line in results["stage_settings"][0])
    with pytest.raises(PmLlmError, match=r"another configuration \(lora.r: 4 -> 8\)"):
        ContinualSequence.open(tmp_path / "run", {"lora.r": 8}).add(*small_tasks("intent"))


def test_adding_to_a_benchmark_and_going_on_with_it(pico_folders, tmp_path, capsys) -> None:
    keys = keys_for(pico_folders["llama"], tmp_path / "run", benchmark="embedded", order="sentiment")
    keys |= {"max_train_samples": 24, "max_test_samples": 4}
    assert main(["run", *words(keys)]) == 0
    assert main(["add", str(tmp_path / "run"), "topic"]) == 0  # a name of the benchmark
    own = jsonl_tasks(tmp_path / "tasks", "question") / "question"
    assert main(["add", str(tmp_path / "run"), json.dumps({"data": str(own), "name": "mine"})]) == 0
    assert RunDir.open(tmp_path / "run").results().stages == ["sentiment", "topic", "mine"]
    state = tmp_path / "run" / "state.json"
    before = state.read_bytes()
    for unfinished, error in (
        ([str(own)], "two tasks have one name"),
        ([], "no task is given"),
        (["nowhere"], "neither a file here"),
    ):
        capsys.readouterr()
        assert main(["add", str(tmp_path / "run"), *unfinished]) == 2
        assert error in capsys.readouterr().err
    assert state.read_bytes() == before


def test_adding_to_an_unfinished_run(pico_folders, tmp_path, capsys, monkeypatch) -> None:
    model, tasks = pico_folders["llama"], jsonl_tasks(tmp_path / "tasks", "sentiment", "topic", "question")
    begin(model, tmp_path / "run", [tasks / "sentiment"]).run()
    monkeypatch.setattr("pm_llm.stage.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ContinualSequence.open(tmp_path / "run").add(str(tasks / "topic"))
    monkeypatch.undo()
    opened = ContinualSequence.open(tmp_path / "run")
    with pytest.raises(PmLlmError, match="trained 1 of 2 tasks; 'topic' is unfinished"):
        opened.add(str(tasks / "question"))
    with pytest.raises(PmLlmError, match=r"has unfinished tasks: topic\. Add them"):
        opened.run()
    with pytest.raises(PmLlmError, match="some tasks are made in Python, and others are entries"):
        ContinualSequence.open(copied(tmp_path)).add(*small_tasks("puzzle"), str(tasks / "question"))
    results = ContinualSequence.open(tmp_path / "run").add(str(tasks / "topic"))  # the same again goes on
    assert results["stages"] == ["sentiment", "topic"]


def test_restoring_and_going_on_from_there(copy, pico_folders, tmp_path, capsys) -> None:
    state, before = RunDir.open(copy).state(), weights(copy)
    assert main(["restore", str(copy), "--to", "topic"]) == 0
    assert "taken back: question" in capsys.readouterr().out
    assert (copy / "adapter").resolve().parent.name == "02-topic"
    assert RunDir.open(copy).results().stages == ["sentiment", "topic"]
    assert main(["status", str(copy)]) == 0
    assert "taken back: question (pm-llm restore" in capsys.readouterr().out
    assert main(["restore", str(copy), "--to", "3"]) == 0  # and back again
    assert weights(copy) == before
    assert [stage.task for stage in RunDir.open(copy).state()["stages"]] == [s.task for s in state["stages"]]
    assert RunDir.open(copy).results().matrix == Results.of(json.loads((copy / "results.json").read_text())).matrix

    assert main(["restore", str(copy), "--to", "topic"]) == 0
    new = jsonl_tasks(tmp_path / "tasks", "puzzle") / "puzzle"
    assert main(["add", str(copy), str(new)]) == 0
    assert sorted(p.name for p in (copy / "stages").iterdir()) == ["01-sentiment", "02-topic", "03-puzzle"]
    # as if the third task had never been
    other = jsonl_tasks(tmp_path / "again", "sentiment", "topic", "puzzle")
    begin(pico_folders["llama"], tmp_path / "plain", [other / n for n in ("sentiment", "topic", "puzzle")]).run()
    assert weights(copy) == weights(tmp_path / "plain")


def test_going_on_further_back_than_curvature_is_kept(copy, tmp_path, capsys) -> None:
    assert main(["restore", str(copy), "--to", "sentiment"]) == 0
    new = jsonl_tasks(tmp_path / "tasks", "puzzle") / "puzzle"
    capsys.readouterr()
    assert main(["add", str(copy), str(new)]) == 2
    assert "is not kept any more (keep_curvature)" in capsys.readouterr().err
    with pytest.raises(PmLlmError, match=r"is not kept any more \(keep_curvature\)"):
        ContinualSequence.open(copy).add(*small_tasks("puzzle"))
    assert main(["restore", str(copy), "--to", "question"]) == 0  # nothing is lost
    for wrong, error in (("nothing", "is no finished task"), ("question", "is the current stage"), ("4", "is no fin")):
        assert main(["restore", str(copy), "--to", wrong]) == 2
        assert error in capsys.readouterr().err


def test_a_stage_that_was_taken_back_may_be_damaged(copy, capsys) -> None:
    assert main(["restore", str(copy), "--to", "topic"]) == 0
    os.truncate(copy / "stages" / "03-question" / "log.jsonl", 3)
    capsys.readouterr()
    assert main(["status", str(copy)]) == 0
    assert "It is of a task that was taken back; nothing else needs it." in capsys.readouterr().out


def test_removing_a_task_takes_its_part_out(three, tmp_path, capsys) -> None:
    assert main(["remove", str(three), "topic", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "relative truncation error 0.000e+00" in said
    assert "| topic |" in said
    state = RunDir.open(three).state()
    left = Adapter.load(tmp_path / "out")
    for name, x in left.factors.items():
        parts = [Adapter.load(RunDir.open(three).stage_adapter(i, "task_adapter")).factors[name] for i in (0, 2)]
        used = [state["stages"][i].coefficients[name] for i in (0, 2)]
        expected = lowrank.add(*(p.scale(c) for p, c in zip(parts, used, strict=True))).dense()
        torch.testing.assert_close(x.dense(), expected, rtol=1e-5, atol=1e-6)
    for task, error in (("nothing", "has finished no task 'nothing'"), ("topic", "exists")):
        out = tmp_path / ("out" if task == "topic" else "other")
        assert main(["remove", str(three), task, "--out", str(out)]) == 2
        assert error in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["seqlora", "ties", "ema"])
def test_what_is_no_sum_is_refused(method: str, pico_folders, tmp_path, capsys) -> None:
    config = load_config(None, keys_for(pico_folders["llama"], tmp_path / "run", method=method))
    ContinualSequence(config, small_tasks("sentiment", "topic")).run()
    assert main(["remove", str(tmp_path / "run"), "topic", "--out", str(tmp_path / "out")]) == 2
    assert "which is no sum of the tasks' adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_that_was_taken_back_comes_again_corrected(copy, tmp_path, capsys, monkeypatch) -> None:
    """Under its old name, from another file; stopped on the way, withdrawn, and added once more."""
    other = jsonl_tasks(tmp_path / "again", "question", train=12) / "question"
    assert main(["restore", str(copy), "--to", "topic"]) == 0
    monkeypatch.setattr("pm_llm.stage.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["add", str(copy), str(other)]) == 130
    monkeypatch.undo()
    assert main(["restore", str(copy), "--to", "topic"]) == 0  # withdrawn
    assert main(["restore", str(copy), "--to", "question"]) == 0  # the first one is there still
    new = jsonl_tasks(tmp_path / "tasks", "puzzle") / "puzzle"
    aside = shutil.copytree(copy, tmp_path / "aside", symlinks=True)
    assert main(["add", str(aside), str(new)]) == 0  # and can be gone on from
    assert main(["restore", str(copy), "--to", "topic"]) == 0
    assert main(["add", str(copy), str(other)]) == 0
    held = json.loads((copy / "stages" / "03-question" / "task.json").read_text())
    assert held["kept"]["train_rows"] == 12
    assert RunDir.open(copy).results().stages == ["sentiment", "topic", "question"]


def test_runs_that_score_every_task_from_the_start(pico_folders, tmp_path, capsys) -> None:
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment", "topic", "question")
    names = [tasks / "sentiment", tasks / "topic"]
    begin(pico_folders["llama"], tmp_path / "run", names, evaluate="all").run()
    assert main(["restore", str(tmp_path / "run"), "--to", "sentiment"]) == 0
    assert RunDir.open(tmp_path / "run").results().tasks == ["sentiment"]
    assert main(["add", str(tmp_path / "run"), str(tasks / "question")]) == 2
    assert "scores every task from the start (evaluate: all)" in capsys.readouterr().err
    assert main(["restore", str(tmp_path / "run"), "--to", "topic"]) == 0
    assert RunDir.open(tmp_path / "run").results().tasks == ["sentiment", "topic"]


def test_scores_alone_are_kept_of_the_last_too(pico_folders, tmp_path) -> None:
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment", "topic")
    names = [tasks / "sentiment", tasks / "topic"]
    results = begin(pico_folders["llama"], tmp_path / "run", names, evaluate="final", keep_test_rows=False).run()
    assert [row[i] is not None for i, row in enumerate(results["matrix"])] == [True, True]
    assert "plasticity" in results


def test_a_restart_goes_on_when_what_it_redid_is_gone(pico_folders, tmp_path, monkeypatch) -> None:
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment", "topic", "question")
    names = [tasks / "sentiment", tasks / "topic", tasks / "question"]
    begin(pico_folders["llama"], tmp_path / "run", names).run()
    before, keys = weights(tmp_path / "run"), keys_for(pico_folders["llama"], tmp_path / "run")
    again = load_config(None, {**keys, "tasks": list(map(str, names)), "evaluate": "seen"})
    trained = iter([None, KeyboardInterrupt])
    real = stage.train

    def stopped(*words, **more):
        if error := next(trained):
            raise error
        return real(*words, **more)

    monkeypatch.setattr("pm_llm.stage.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        ContinualSequence(again, restart_from="topic").run()
    monkeypatch.undo()
    shutil.rmtree(names[1])
    ContinualSequence(again, restart_from="topic").run()
    assert weights(tmp_path / "run") == before


def test_what_is_wrong_with_rows_is_said_as_it_is(three, pico_folders) -> None:
    """Redoing the first task needs its rows, and nothing that was remembered."""
    config = load_config(None, keys_for(pico_folders["llama"], three, tasks=[str(three / "nothing.jsonl")]))
    with pytest.raises(PmLlmError) as raised:
        ContinualSequence(config, restart_from="1")
    assert "does not exist" in str(raised.value)
    assert "keep_curvature" not in str(raised.value)


def test_help_of_the_commands() -> None:
    for command in ("add", "remove", "restore", "export"):
        assert pm_llm(command, "--help").returncode == 0
