"""What keeps a model as it was: rows that are mixed into every task, and kept prompts that it answers itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pm_llm import ContinualSequence, PmLlmError, Task
from pm_llm.config import load_config
from pm_llm.constraints.base import Context
from pm_llm.constraints.replay import Replay
from pm_llm.session import Watcher
from pm_llm.tasks.order import retaining
from pm_llm.training.own_answers import own_answers
from tests.conftest import ROOT
from tests.helpers.presets import KEYS

COLOURS = ("red", "blue")


def task(name: str, colour: str, rows: int = 20) -> Task:
    given = [{"prompt": f"the colour of {name} {i} ?", "completion": colour} for i in range(rows)]
    return Task.from_rows(name, given, given[:4])


class Seen(Watcher):
    """Notes the rows of each stage."""

    def __init__(self) -> None:
        self.rows, self.trained = [], []

    def measured(self, stage) -> None:
        self.rows.append(list(stage.rows))
        self.session = stage.session


def sequence(folder: Path, watcher: Watcher, **keys) -> ContinualSequence:
    given = {**KEYS, "method": "seqlora", "output_dir": str(folder), "max_new_tokens": 2, **keys}
    tasks = [task("film", "red"), task("song", "blue")]
    return ContinualSequence(load_config(None, given), tasks, watchers=[watcher])


def test_retained_rows_are_a_share_of_every_task(tmp_path) -> None:
    general = [{"prompt": f"say {i}", "completion": "green"} for i in range(7)]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    seen = Seen()
    found = sequence(tmp_path / "run", seen, retain={"data": str(tmp_path / "general.jsonl"), "share": 0.2}).run()
    assert found["tasks"] == ["film", "song"]  # they are not scored
    encoder = seen.session.encoders["retain.general"]
    for rows in seen.rows:
        assert len(rows) == 25
        answers = Counter(
            encoder.tokenizer.decode([i for i in row["labels"] if i != -100], skip_special_tokens=True).strip()
            for row in rows
        )
        assert answers["green"] == 5  # 20 % of 25
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "say it", "completion": "white"}) + "\n")
    with pytest.raises(PmLlmError, match="training rows of task 'film'"):  # other rows are other training
        sequence(tmp_path / "run", seen, retain={"data": str(tmp_path / "general.jsonl"), "share": 0.2}).run()


def test_no_retained_row_is_drawn_twice_before_all_were() -> None:
    kept = [task("general", "green", 3)]
    (found,) = retaining([task("film", "red", 27)], kept, 0.25, 0)  # 9 of 36
    ((name, rows),) = found.foreign
    assert (name, Counter(row.body for row in rows).most_common()[-1][1]) == ("general", 3)
    assert retaining([task("film", "red")], [], 0.5, 0) == [task("film", "red")]


def test_retain_without_rows_is_told() -> None:
    with pytest.raises(PmLlmError, match=r"retain\.share is given, and retain\.data is not"):
        load_config(None, {"retain.share": 0.1}).check()


def test_own_answers_are_drawn_and_only_those_that_score_stay(tmp_path) -> None:
    """Each is what the model draws; it stays where it is the right one. (The embedded model is never quite sure.)"""
    seen = Seen()
    keys = {"train.max_steps": 40, "method": "replay", "constrain": {"name": "replay", "share": 1.0, "answers": "own"}}
    found = sequence(tmp_path / "run", seen, **keys).run()
    assert found["constraint_reports"][0] == {"replayed": 0.0}
    assert 2 <= found["constraint_reports"][1]["replayed"] < 20
    session = seen.session
    encoder = session.encoders["song"]
    right, wrong = (encoder.features(task("song", colour).train) for colour in ("blue", "mouse"))
    drawn = encoder.family.draw(session.model, encoder, [*right, *wrong], 7 + 2, session.config.evaluation)
    own = own_answers(session, 7, [*right, *wrong], [2] * 40, 50.0)
    fits = [row["labels"] == want["labels"] for row, want in zip(drawn, [*right, *wrong], strict=True)]
    assert own == [row if fit else None for row, fit in zip(drawn, fits, strict=True)]
    assert any(fits[:20])
    assert not all(fits[:20])


def test_own_answers_go_on_as_they_were(tmp_path) -> None:
    """What is kept comes back with the task that it is of."""
    kept = Replay(share=0.5, answers="own")
    rows = [{"input_ids": [1, i], "labels": [-100, i]} for i in range(4)]
    kept.remember(Context(1, rows=rows, seed=1))
    kept.remember(Context(2, rows=rows, seed=2))
    again = Replay(share=0.5, answers="own")
    again.load_memory(kept.memory())
    assert (again.kept, again._of) == (kept.kept, [1, 1, 2, 2])
    asked = []

    def answer(given, tasks, at_least):
        asked.append((list(tasks), at_least))
        return [given[0], None, given[2], None]

    assert again.rows(rows, Context(3, rows=rows, answer=answer)) == [*rows, kept.kept[0], kept.kept[2]]
    assert asked == [([1, 1, 2, 2], 50.0)]
    assert again.finish(Context(3)) == {"replayed": 2.0}
    with pytest.raises(PmLlmError, match="needs a run"):
        again.rows(rows, Context(3, rows=rows))


def test_own_answers_need_prompts(tmp_path) -> None:
    pages = [{"text": f"the film {i} was good"} for i in range(8)]
    tasks = [Task.from_rows("pages", pages, pages[:2])]
    keys = {**KEYS, "output_dir": str(tmp_path), "method": "replay"}
    keys |= {"constrain": {"name": "replay", "answers": "own"}}
    with pytest.raises(PmLlmError, match="asks prompts, which raw text"):
        ContinualSequence(load_config(None, keys), tasks)


def test_the_page_shows_keys_that_are_ones() -> None:
    page = (ROOT / "docs/methods.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "anchor" in block]
    lines = text.strip().splitlines()
    assert len(lines) == 7
    for line in lines:
        load_config(
            None, {"tasks": ["x"], "method": "pm_curvature", "merge": "optimal", **yaml.safe_load(line)}
        ).check()


def test_rows_of_what_the_run_began_with_stay_as_they_are(tmp_path) -> None:
    """Tasks are counted from behind it; so old runs' rows, of which nobody knows the task, stay, too."""
    seen = Seen()
    sequence(tmp_path / "run", seen).run()
    session = seen.session
    session.folds = 1
    rows = session.encoders["film"].features(task("film", "red", 6).train)
    assert own_answers(session, 0, rows, [1] * 6, 100.0) == rows
    assert own_answers(session, 0, rows, [0] * 6, 100.0) == rows
    drawn = session.encoders["film"].family.draw(
        session.model, session.encoders["film"], rows, 0 + 1, session.config.evaluation
    )
    wanted = [a if a["labels"] == b["labels"] else None for a, b in zip(drawn, rows, strict=True)]
    assert own_answers(session, 0, rows, [2] * 6, 100.0) == wanted  # of the first task
    old = {key: x for key, x in Replay(share=0.5).memory().items() if key != "tasks"}
    Replay(buffer="reservoir").load_memory(old)


def test_a_reservoir_of_a_run_of_before_goes_on() -> None:
    rows = [{"input_ids": [1, i], "labels": [-100, i]} for i in range(40)]
    before, again = Replay(share=0.1, buffer="reservoir"), Replay(share=0.1, buffer="reservoir")
    before.remember(Context(1, rows=rows, seed=1))
    again.load_memory({key: x for key, x in before.memory().items() if key != "tasks"})
    again.remember(Context(2, rows=rows, seed=2))
    assert len(again.kept) == len(again._of) == 4
    assert set(again._of) <= {0, 2}


def test_own_answers_need_a_scorer_of_answers(tmp_path) -> None:
    keys = {"method": "replay", "constrain": {"name": "replay", "answers": "own"}}
    for scorer in ("verified", "bleu", "sari"):
        tasks = [replace(task("film", "red"), scorer=scorer)]
        config = load_config(None, {**KEYS, "output_dir": str(tmp_path), **keys})
        with pytest.raises(PmLlmError, match=f"scorer {scorer} of task 'film' does not say"):
            ContinualSequence(config, tasks)


def test_tasks_are_added_to_a_run_that_retains(tmp_path) -> None:
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "say it", "completion": "green"}) + "\n")
    run = sequence(tmp_path / "run", Seen(), retain=str(tmp_path / "general.jsonl"))
    run.run()
    assert run.add(task("book", "green"))["stages"] == ["film", "song", "book"]


def test_retained_rows_may_be_gone_when_all_tasks_are_trained(tmp_path) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps({"prompt": "say it", "completion": "green"}) + "\n")
    found = sequence(tmp_path / "run", Seen(), retain=str(file)).run()
    file.unlink()
    assert ContinualSequence.open(tmp_path / "run").conclude() == found
    with pytest.raises(PmLlmError, match="general"):  # another task would be trained with them
        ContinualSequence.open(tmp_path / "run").add(task("book", "green"))


def test_the_base_is_no_anchor_for_an_adapter_that_is_to_be_kept() -> None:
    keys = {"tasks": ["x"], "adapter": "somewhere", "constrain": {"name": "anchor", "to": "base"}, "method": "seqlora"}
    with pytest.raises(PmLlmError, match="anchor to before"):
        load_config(None, keys).check()
