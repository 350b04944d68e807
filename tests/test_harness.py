"""lm-evaluation-harness on the live model: tasks of a local folder, their rows as columns, files of its results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pm_llm import ContinualSequence, PmLlmError, Task
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.harness import Outside, read_results
from pm_llm.report.data import open_run
from pm_llm.report.gate import Course, judge
from pm_llm.run.folder import RunDir
from tests.helpers.presets import KEYS

lm_eval = pytest.importorskip("lm_eval")

ROWS = [{"question": f"the colour of film {i} ?", "answer": "red" if i % 3 else "blue"} for i in range(9)]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATED = """
task: said
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 1
filter_list:
  - name: first
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PERPLEXITY = """
task: fluent
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    rows = made / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("chosen", "chosen_too"):
        (made / f"{name}.yaml").write_text(CHOICE.format(name=name, rows=rows))
    (made / "said.yaml").write_text(GENERATED.format(rows=rows))
    (made / "fluent.yaml").write_text(PERPLEXITY.format(rows=rows))
    (made / "both.yaml").write_text("group: both\ntask: [chosen, chosen_too]\n")
    return made


def sequence(path: Path, folder: Path, names: list[str], **keys) -> ContinualSequence:
    rows = [{"prompt": row["question"], "completion": "red"} for row in ROWS]
    given = {**KEYS, "method": "seqlora", "output_dir": str(path), "evaluate": "seen", "train.max_steps": 20}
    given |= {"general.lm_eval": names, "general.lm_eval_dir": str(folder), **keys}
    return ContinualSequence(
        load_config(None, given), [Task.from_rows(name, rows, rows[:3]) for name in ("one", "two")]
    )


def test_its_tasks_are_columns_of_a_run(folder, tmp_path) -> None:
    run = sequence(tmp_path / "run", folder, ["chosen", "said", "both"], **{"general.limit": 6})
    found = run.run()
    assert found["tasks"] == ["one", "two", "lm_eval.chosen", "lm_eval.said", "lm_eval.both"]
    assert found["test_rows"] == [3, 3, 6, 6, 12]
    assert set(found["untrained"]) == {"lm_eval.chosen", "lm_eval.said", "lm_eval.both"}
    assert found["matrix"][0][2:] == pytest.approx([400 / 6] * 3)  # it says red, and 4 of 6 are
    own = lm_eval.simple_evaluate(  # as the harness has it, on the model as it is now
        lm_eval.models.huggingface.HFLM(run.session.model, tokenizer=run.session.base.tokenizer),
        tasks=["both", "said"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        limit=6,
        bootstrap_iters=0,
    )["results"]
    assert found["matrix"][1][3] == pytest.approx(100 * own["said"]["exact_match,first"])
    assert found["matrix"][1][4] == pytest.approx(50 * (own["chosen"]["acc,none"] + own["chosen_too"]["acc,none"]))
    assert [x.task for x in judge(Course.of(RunDir.open(tmp_path / "run")), 2.0)] == [
        *("one", "lm_eval.chosen", "lm_eval.said", "lm_eval.both", "mean of the general abilities")
    ]
    assert len(open_run(tmp_path / "run").predictions[1]["lm_eval.both"].keys) == 12
    assert sequence(tmp_path / "run", folder, ["chosen", "said", "both"], **{"general.limit": 6}).run() == found


def test_a_run_trains_alike_with_and_without_it(folder, tmp_path) -> None:
    """The harness sets seeds and modes of its own; none of that stays."""
    with_it = sequence(tmp_path / "with", folder, ["chosen"], **{"lora.lora_dropout": 0.2}).run()
    without = sequence(
        tmp_path / "without", folder, [], **{"lora.lora_dropout": 0.2, "general.lm_eval_dir": None}
    ).run()
    assert with_it["shifts"] == without["shifts"]


def test_every_process_of_a_launcher_has_its_results(folder, tmp_path, monkeypatch) -> None:
    run = sequence(tmp_path / "run", folder, [], **{"general.lm_eval_dir": None})
    run.run()
    monkeypatch.setenv("LOCAL_RANK", "1")
    session = run.session
    found = Outside("chosen", folder=str(folder)).predictions(
        session.model, session.base.tokenizer, session.config.evaluation
    )
    assert len(found.predictions) == 9
    assert os.environ["LOCAL_RANK"] == "1"


def test_what_cannot_be_scored_is_told(folder, tmp_path) -> None:
    with pytest.raises(PmLlmError, match=r"no task 'ifevl'\. Did you mean 'ifeval'"):
        Outside("ifevl", folder=str(folder)).rows()
    with pytest.raises(PmLlmError, match="is no folder"):
        Outside("chosen", folder=str(folder / "none")).rows()
    with pytest.raises(PmLlmError, match="only a share from 0 to 1"):
        sequence(tmp_path / "run", folder, ["fluent"]).run()
    (folder / "rows.jsonl").unlink()
    with pytest.raises(PmLlmError, match="cannot load its task 'chosen'"):
        Outside("chosen", folder=str(folder)).rows()


def test_other_rows_are_told(folder, tmp_path) -> None:
    sequence(tmp_path / "run", folder, ["chosen"]).run()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    with pytest.raises(PmLlmError, match=r"test rows of task 'lm_eval\.chosen'"):
        sequence(tmp_path / "run", folder, ["chosen"]).run()


def test_files_of_its_command_line_are_read(tmp_path, capsys) -> None:
    base = {"results": {"ifeval": {"alias": "ifeval", "acc,none": 0.25, "acc_stderr,none": 0.02}}}
    other = {"results": {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}}}
    for name, found in (("base", base), ("adapter", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert read_results(tmp_path / "base.json") == {"ifeval acc": (0.25, 0.02)}
    rows = [{"prompt": "say", "completion": "red"}] * 2
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run")}
    ContinualSequence(load_config(None, keys), [Task.from_rows("one", rows, rows)]).run()
    capsys.readouterr()
    files = [str(tmp_path / f"{name}.json") for name in ("base", "adapter")]
    assert main(["report", str(tmp_path / "run"), "--lm-eval", *files]) == 0
    said = capsys.readouterr().out
    assert "| ifeval acc | 0.25 ± 0.02 |  |" in said
    assert "| gsm8k exact_match (strict-match) |  | 0.5 |" in said
    for text in ("{}", "[1]", "no json", '{"results": {}}'):
        (tmp_path / "bad.json").write_text(text)
        assert main(["report", str(tmp_path / "run"), "--lm-eval", str(tmp_path / "bad.json")]) == 2
        assert "bad.json" in capsys.readouterr().err
