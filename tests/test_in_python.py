"""Tasks and Fishers from Python, without files."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from pm_llm import ContinualSequence, PmLlmError
from pm_llm.config import load_config
from pm_llm.fisher.rows import ChosenRows
from pm_llm.sections import FisherSection
from pm_llm.tasks.base import Task
from tests.conftest import DECODER, make_peft, tokenizer
from tests.helpers.kinds import encoder, of_kind
from tests.helpers.presets import KEYS

ROWS = [{"prompt": f"is {i} even ?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(12)]


def test_tasks_come_from_datasets_streams_and_rows() -> None:
    task = Task.from_rows("even", ROWS, ROWS[:4], labels=["yes", "no"])
    assert (len(task.train), len(task.test), task.labels) == (12, 4, ("yes", "no"))
    assert task.test[3].place == "even/test:row 4"
    assert Task.from_dataset("even", Dataset.from_list(ROWS), Dataset.from_list(ROWS[:4])).train == task.train
    assert Task.from_dataset("even", Dataset.from_list(ROWS).to_iterable_dataset(), ROWS[:4]).train == task.train
    law = [{"question": "q ?", "words": ["a", "b"], "answer": "x"}] * 10
    task = Task.from_rows("law", law, prompt="{question} {words}", completion="answer", test_size=0.2)
    assert (len(task.train), len(task.test), task.train[0].body) == (8, 2, "q ? a\nb")
    assert Task.from_rows("text", [{"text": "a text ."}] * 10).kind == "text"


def test_what_is_wrong_with_rows_in_memory_is_told_by_split_and_number() -> None:
    with pytest.raises(PmLlmError, match="even/train:row 2: its answer"):
        Task.from_rows("even", [ROWS[0], {**ROWS[1], "completion": ""}, *ROWS[2:]], ROWS)
    found = Task.from_rows("even", [ROWS[0], {**ROWS[1], "completion": ""}, *ROWS[2:]], ROWS, bad_rows="drop")
    assert len(found.train) == 11
    with pytest.raises(PmLlmError, match="unknown key 'promt'"):
        Task.from_rows("even", ROWS, ROWS, promt="prompt")


def test_a_run_of_tasks_made_in_python(tmp_path) -> None:
    keys = {**KEYS, "output_dir": str(tmp_path / "run"), "method": "seqlora"}
    tasks = [Task.from_rows(name, ROWS, ROWS[:2]) for name in ("one", "two")]
    assert ContinualSequence(load_config(None, keys), tasks=tasks).run()["stages"] == ["one", "two"]


def test_datasets_are_made_tasks_first(tmp_path) -> None:
    config = load_config(None, {**KEYS, "output_dir": str(tmp_path / "run")})
    with pytest.raises(PmLlmError, match=r"tasks\[0\] is a Dataset. Make it a task: Task.from_dataset"):
        ContinualSequence(config, tasks=[Dataset.from_list(ROWS)])


def test_what_a_run_says_of_prompts_that_it_shortens(tmp_path, capsys) -> None:
    rows = [{**row, "prompt": "word " * 40 + row["prompt"]} if i < 3 else row for i, row in enumerate(ROWS)]
    keys = {**KEYS, "output_dir": str(tmp_path / "run"), "method": "seqlora", "max_length": 32}
    ContinualSequence(load_config(None, keys), tasks=[Task.from_rows("one", rows, ROWS[:2])]).run()
    said = capsys.readouterr().out
    assert f"task 'one': 3 of {len(rows)} training prompts are longer than" in said
    line = json.loads(next((tmp_path / "run/stages/01-one/predictions").iterdir()).read_text().splitlines()[0])
    assert (line["prompt"], line["place"]) == (ROWS[0]["prompt"], "one/test:row 1")


def test_a_fisher_in_one_call_is_that_of_a_run() -> None:
    from pm_llm import mean_loss, measure

    model, task = make_peft("llama", random_b=True), of_kind("prompt", "sentiment")
    rows = encoder("prompt", task).features(task.train)
    chosen = ChosenRows("t", rows, FisherSection(samples=5), 3, tokenizer("llama"), DECODER)
    expected = chosen.fisher(model, "dense").modules
    masked = [{"input_ids": row["input_ids"], "completion_mask": [x != -100 for x in row["labels"]]} for row in rows]
    given = {"samples": 5, "seed": 3}
    for some in (task, Dataset.from_list(rows), masked):
        found = measure(model, some, tokenizer("llama"), form="dense", **given, max_length=64)
        for name, one in found.modules.items():
            torch.testing.assert_close(one.F, expected[name].F)
    assert mean_loss(model, task, tokenizer("llama"), **given) == pytest.approx(chosen.loss(model))
    with pytest.raises(PmLlmError, match="needs input_ids and labels"):
        measure(model, ROWS, tokenizer("llama"))
    with pytest.raises(PmLlmError, match="no row"):
        measure(model, [], tokenizer("llama"))
