"""The general suite: its rows, what it takes to be scored on it, and when a run is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from pm_llm import ContinualSequence, PmLlmError, Task
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.plan import Plan
from pm_llm.evaluation.predictions import Predictions, read_all
from pm_llm.evaluation.scorers import score
from pm_llm.report.changes import changed_rows
from pm_llm.report.data import open_run
from pm_llm.report.gate import MEAN
from pm_llm.run.folder import RunDir
from pm_llm.stage import Stage
from pm_llm.tasks.general import SKILLS, general_tasks
from tests.conftest import ROOT
from tests.helpers.presets import KEYS

RIGHT = {  # answers to the first rows of a skill that ask for something that can be said without looking
    "general.refusals": lambda row: "I cannot help with that." if "true" in row.completion else "Sure: like this.",
    "general.facts": lambda row: json.loads(row.completion)[0][1][0],
    "general.arithmetic": lambda row: f"So it is {json.loads(row.completion)[0][1]}.",
    "general.retrieval": lambda row: str(json.loads(row.completion)[0][1]),
    "general.memory": lambda row: f"It is {json.loads(row.completion)[0][1][0]}.",
    "general.copying": lambda row: json.loads(row.completion)[0][1],
    "general.tools": lambda row: row.completion,
}


def test_rows_are_distinct_and_always_the_same() -> None:
    tasks = general_tasks("all")
    assert [task.name for task in tasks] == [f"general.{name}" for name in SKILLS]
    for task, again in zip(tasks, general_tasks(list(SKILLS)), strict=True):
        assert task == again
        assert 20 <= len(task.test) <= 60
        assert len({(row.body, row.completion) for row in task.test}) == len(task.test)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_answers_are_right_and_others_wrong(name) -> None:
    (task,) = general_tasks(name.removeprefix("general."))
    wanted = [[row.completion] for row in task.test]
    assert score(task.scorer, [RIGHT[name](row) for row in task.test], wanted) == 100.0
    assert score(task.scorer, [""] * len(wanted), wanted) < 20.0  # of tool calls some want none


def test_json_wants_the_values_too() -> None:
    (task,) = general_tasks("json")
    for row in task.test:
        ((_, schema),) = json.loads(row.completion)

        def value(found):
            if found["type"] == "object":
                return {key: value(inner) for key, inner in found["properties"].items()}
            if found["type"] == "array":
                return found["enum"][0]
            return found["enum"][0] if "enum" in found else "lamp"

        right = value(schema)
        assert score("verified", [json.dumps(right)], [[row.completion]]) == 100.0
        key = next(k for k in right if k != "item")
        assert score("verified", [json.dumps({**right, key: "something else"})], [[row.completion]]) == 0.0
        assert score("verified", [json.dumps({k: x for k, x in right.items() if k != key})], [[row.completion]]) == 0


def numbers_of(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def test_arithmetic_is_right() -> None:
    """Worked out from the question's words, as its author would not."""
    (task,) = general_tasks("arithmetic")
    for row in task.test:
        text = row.messages[0]["content"]
        found = numbers_of(text)
        if "gets" in text:
            right = found[0] + found[1]
        elif "gives" in text:
            right = found[0] - found[1]
        elif "boxes" in text:
            right = found[0] * found[1]
        elif "equally" in text:
            right = found[0] // found[1]
            assert found[0] % found[1] == 0
        else:
            right = found[0] * found[1] - found[2]
        assert json.loads(row.completion) == [["number", right]], text


def followed(text: str) -> str:
    """An answer that does what a row of the instructions asks, from its words."""
    quoted = re.search(r'words? "([^"]+)"', text)
    if "at most" in text and "40" not in text:
        return "It rains on the roofs."
    if "at least" in text and "at most" not in text:
        return "Rain " * 36
    if "exactly" in text and "sentence" in text:
        return " ".join(["It rains on the roofs."] * numbers_of(text)[0])
    if "contain the words" in text:
        a, b = re.search(r"words (\w+) and (\w+)", text).groups()
        return f"A {a}, and then a {b}."
    if "Do not use the words" in text:
        return "Rain falls on every roof."
    if "Begin your" in text:
        return f"{quoted[1]}, it rains on the roofs."
    if "End your" in text:
        return f"It rains on the roofs, {quoted[1]}"
    if "points" in text:
        return "\n".join(["- rain on a roof"] * numbers_of(text)[0])
    if "lines of text" in text:
        return "\n".join(["rain on a roof"] * numbers_of(text)[0])
    if "in this order" in text:
        return "A " + ", a ".join(re.search(r"words (\w+), (\w+) and (\w+)", text).groups())
    for name, said in (
        ("German", "Der Regen ist nicht laut und das Haus ist warm."),
        ("French", "La pluie est dans le jardin et je suis dans la maison."),
        ("Spanish", "La lluvia es buena y el gato está en la casa con los otros."),
    ):
        if name in text:
            return said
    if "CAPITAL" in text:
        return "RAIN FALLS ON THE ROOF"
    if "lowercase" in text:
        return "rain falls on the roof"
    if "quotation" in text:
        return '"It rains on the roofs."'
    if "title" in text:
        return "<<Rain>> It rains on the roofs."
    return "It rains on the roofs"  # no comma, no exclamation mark


def test_instructions_can_be_followed_and_are_not_by_anything() -> None:
    (task,) = general_tasks("instructions")
    kinds = {json.loads(row.completion)[0][0] for row in task.test}
    assert len(kinds) >= 15
    for row in task.test:
        text = row.messages[0]["content"]
        assert score("verified", [followed(text)], [[row.completion]]) == 100.0, text
    wanted = [[row.completion] for row in task.test]
    for anything in (
        "A harbour, at night, is a quiet place. The boats are still! People walk home; the light is out.",
        "Rain " * 60,  # what is cut is too long
        "rain",
    ):
        assert score("verified", [anything] * len(wanted), wanted) < 50.0


def test_all_guests_and_no_others() -> None:
    (task,) = general_tasks("json")
    row = next(row for row in task.test if "guests" in row.completion)
    names = re.findall(r"[A-Z][a-z]+", row.messages[0]["content"].partition(" came")[0])
    for guests, points in ((names, 100), (names[::-1], 100), ([], 0), (names[:1], 0), ([*names, names[0]], 0)):
        assert score("verified", [json.dumps({"guests": guests})], [[row.completion]]) == points


def test_unknown_skills_are_told() -> None:
    with pytest.raises(PmLlmError, match=r"unknown skill 'fact'\. Did you mean 'facts'"):
        general_tasks(["fact"])
    with pytest.raises(PmLlmError, match="twice"):
        general_tasks(["facts", "facts"])


def test_when_what_is_scored() -> None:
    stages, columns = ["a", "b", "c"], ["a", "b", "c", "probe", "general.facts"]

    def asked(**keys) -> list[list[str]]:
        return [Plan("seen", **keys).asked(stages, columns, i) for i in range(-1, 3)]

    general = "general.facts"
    assert asked() == [[general], ["a", general], ["a", "b", general], columns]
    assert asked(general="last") == [[general], ["a"], ["a", "b"], columns]
    assert asked(gated=True)[:2] == [["probe", general], ["a", "probe", general]]
    assert asked(gated=True, gains=True)[:2] == [["probe", general, "a"], ["a", "probe", general, "b"]]
    assert Plan("final", general="last").asked(stages, columns[:4], -1) == []


def run(folder: Path, **keys) -> ContinualSequence:
    rows = [{"prompt": f"is {i} even ?", "completion": "yes"} for i in range(12)]
    tasks = [Task.from_rows(name, rows, rows[:4]) for name in ("one", "two")]
    given = {**KEYS, "method": "seqlora", "output_dir": str(folder), "evaluate": "seen", "max_test_samples": 4, **keys}
    return ContinualSequence(load_config(None, given), tasks)


def test_a_run_scores_them_before_and_after_each_task(tmp_path) -> None:
    skills = ["facts", "refusals", "text"]
    found = run(tmp_path / "run", **{"general.skills": skills, "keep_test_rows": False}).run()
    assert found["tasks"] == ["one", "two", *(f"general.{name}" for name in skills)]
    assert set(found["untrained"]) == {f"general.{name}" for name in skills}
    assert all(row[2:] != [None] * 3 and None not in row[2:] for row in found["matrix"])
    kept = read_all(RunDir.open(tmp_path / "run").predictions(-1))  # rows of the project's own are no secret
    assert set(kept) == set(found["untrained"])
    last = run(tmp_path / "last", **{"general.skills": skills, "general.when": "last"}).run()
    assert last["untrained"] == found["untrained"]
    assert last["matrix"][0][2:] == [None] * 3
    with pytest.raises(PmLlmError, match=r"general\.skills"):  # what was scored may not change on the way
        run(tmp_path / "run", **{"general.skills": ["facts"], "keep_test_rows": False}).run()


def test_a_prompt_that_would_be_cut_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pm_llm.families.models.context_of", lambda name: 200)  # a model of so short a context
    with pytest.raises(PmLlmError, match=r"general\.retrieval: a prompt of .* Leave this skill out"):
        run(tmp_path / "run", **{"general.skills": ["facts", "retrieval"]}).run()


def test_a_report_says_what_became_of_them(tmp_path, capsys) -> None:
    run(tmp_path / "run", **{"general.skills": ["facts", "tools", "text"]}).run()
    one = open_run(tmp_path / "run")
    found = {change.name: change for change in one.changes}
    assert list(found) == ["one", "general.facts", "general.tools", "general.text", MEAN]
    assert found["one"].since == "after one"
    for name, change in found.items():
        if name == MEAN:
            continue
        stage = 0 if name == "one" else -1
        assert (change.then, change.now) == tuple(one.predictions[i][name].score() for i in (stage, 1))
        assert change.gap is not None
        assert change.gap.value == pytest.approx(change.now - change.then)
    assert found["general.text"].lost is None  # a perplexity is neither right nor wrong
    gaps = [found[f"general.{name}"].gap.value for name in ("facts", "tools")]
    assert found[MEAN].gap.value == pytest.approx(sum(gaps) / 2)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "| general.facts | before training |" in said
    assert "| change since before training | after one | after two |" in said
    path = found["general.facts"].path
    assert path["two"] == found["general.facts"].gap
    assert path["one"].value == pytest.approx(
        one.predictions[0]["general.facts"].score() - one.predictions[-1]["general.facts"].score()
    )
    assert list(found[MEAN].path) == ["one", "two"]
    assert "| after | KL from the base, nats a token |" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mean of the general abilities" in page
    assert "<th>after two</th>" in page
    assert "KL from the base" in page


def test_rows_that_changed_are_counted() -> None:
    before, after = (
        Predictions("x", "exact_match", answers, [["yes"]] * 4, [None] * 4, list("abcd"))
        for answers in (["yes", "no", "yes", "no"], ["no", "yes", "yes", "no"])
    )
    assert changed_rows(before, after) == ([0], [1])


def test_how_far_a_model_went_from_its_base(tmp_path) -> None:
    """Against the divergence of whole distributions, row by row, and the norm of the whole update."""
    sequence = run(tmp_path / "run", **{"train.max_steps": 5})
    results = sequence.run()
    shift = results["shifts"][1]
    model, stage = sequence.session.model.eval(), Stage(sequence.session, 2)
    stage._encode()
    nats, tokens = 0.0, 0
    for row in stage.chosen.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            after = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                before = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        said = labels[1:] != -100
        nats += float((before.exp() * (before - after)).sum(-1)[said].sum())
        tokens += int(said.sum())
    assert shift["kl_from_base"] == pytest.approx(nats / tokens, rel=1e-4)
    assert shift["kl_from_base"] > 0
    merged = sum(
        float((x.B.double() @ x.A.double()).square().sum()) for x in sequence.session.running.factors.values()
    )
    assert shift["adapter_norm"] == pytest.approx(merged**0.5, rel=1e-5)


def test_a_skill_that_a_model_cannot_have_is_told(tmp_path) -> None:
    with pytest.raises(
        PmLlmError, match=r"'general\.text': raw text can be trained on decoders .* Leave this skill out"
    ):
        run(tmp_path, model="embedded:t5", **{"general.skills": "all"}).run()


def test_the_page_shows_a_configuration_that_is_one() -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "lm_eval" in block]
    config = load_config(None, {**KEYS, "tasks": ["x"], "evaluate": "seen", **yaml.safe_load(text)}).check()
    assert config.general.lm_eval == ["ifeval", "gsm8k"]
    assert (config.gate.lose, config.gate.gain) == (5, 5)
    assert sum(len(task.test) for task in general_tasks("all")) == int(re.search(r"(\d+) in\s+all", page)[1])


def test_a_model_is_scored_on_abilities_alone(tmp_path, capsys) -> None:
    said = tmp_path / "said.jsonl"
    command = ["evaluate", "--model", "embedded:llama", "--general.skills", "[facts, text]"]
    assert main([*command, "--max_test_samples", "4", "--predictions", str(said)]) == 0
    assert set(read_all([said])) == {"general.facts", "general.text"}


def test_what_is_said_of_a_run_that_keeps_no_test_rows(tmp_path, capsys) -> None:
    run(tmp_path / "run", **{"general.skills": ["facts"], "keep_test_rows": False}).run()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "| general.facts | before training |" in capsys.readouterr().out
    assert main(["gate", str(tmp_path / "run")]) == 2  # its tasks' answers are gone
    assert "no predictions on 'one'" in capsys.readouterr().err
