"""Raw text and preference pairs among other rows: how they are found, told, run one after another, and shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pm_llm import ContinualSequence, PmLlmError
from pm_llm.config import RunConfig, load_config
from pm_llm.evaluation.matrix import Matrix
from pm_llm.families.base import KINDS
from pm_llm.tasks.base import Example, Task, checked
from pm_llm.tasks.loading import load_tasks
from tests.conftest import KINDS as FAMILY
from tests.conftest import make_model, tokenizer
from tests.helpers.kinds import kind_tasks
from tests.helpers.presets import KEYS


# ---- rows ----
def test_an_encoder_decoder_has_prompts_with_answers_only() -> None:
    for kind in ("text", "preference"):
        with pytest.raises(PmLlmError, match=f"{KINDS[kind]} can be trained on decoders"):
            FAMILY["t5"].of(kind)


def file_of(tmp_path, *rows: dict, name: str = "a"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    return str(tmp_path / f"{name}.jsonl")


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"text": "a text ."}, {}, Example("", "a text .", kind="text")),
        ({"body": "a text .", "url": "x"}, {"text": "body"}, Example("", "a text .", kind="text")),
        (
            {"prompt": "q ?", "chosen": "yes", "rejected": "no"},
            {},
            Example("q ?", "yes", rejected="no", kind="preference"),
        ),
        (
            {"question": "q ?", "chosen": "yes", "rejected": "no", "score_chosen": 2.0},
            {},
            Example("q ?", "yes", rejected="no", kind="preference"),
        ),
        (
            {
                "chosen": [turn("user", "q ?"), turn("assistant", "yes")],
                "rejected": [turn("user", "q ?"), turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
        (
            {
                "prompt": [turn("user", "q ?")],
                "chosen": [turn("assistant", "yes")],
                "rejected": [turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
        (
            {  # as UltraFeedback has it
                "prompt": "q ?",
                "chosen": [turn("user", "q ?"), turn("assistant", "yes")],
                "rejected": [turn("user", "q ?"), turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
    ],
)
def test_kinds_are_found_by_their_columns(row: dict, keys: dict, expected: Example, tmp_path) -> None:
    (task,) = load_tasks(RunConfig(tasks=[{"data": file_of(tmp_path, row), **keys}]))
    assert replace(task.train[0], place="") == expected
    assert task.kind == expected.kind
    assert task.scorer == {"text": "perplexity", "preference": "pair_accuracy"}[expected.kind]


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"text": "a", "title": "b"}, {}, "text and nothing beside it leave out title. Leave out with `ignore"),
        ({"text": " "}, {}, "its text is empty"),
        ({"text": "a"}, {"labels": ["a", "b"]}, "raw text has no labels"),
        ({"text": "a"}, {"scorer": "rougeL"}, "rougeL does not score rows of the kind text. Use perplexity"),
        ({"prompt": "q", "completion": "a"}, {"scorer": "pair_accuracy"}, "pair_accuracy does not score rows"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, {}, "its two answers are one"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, {}, "one of its two answers is empty"),
        ({"chosen": "a b", "rejected": [turn("user", "a")]}, {}, "must be two texts, or two lists of turns"),
        (
            {
                "chosen": [turn("user", "p"), turn("assistant", "yes")],
                "rejected": [turn("user", "q"), turn("assistant", "no")],
                "prompt": [],
            },
            {},
            "answer different prompts",
        ),
    ],
)
def test_what_is_wrong_with_them_is_told(row: dict, keys: dict, said: str, tmp_path) -> None:
    with pytest.raises(PmLlmError, match=said):
        load_tasks(RunConfig(tasks=[{"data": file_of(tmp_path, row), **keys}]))


def test_a_task_has_rows_of_one_kind() -> None:
    with pytest.raises(PmLlmError, match="of the kind 'text', and the task's first row of 'prompt'"):
        checked([Task("t", [Example("q", "a"), Example("", "a", kind="text")], [Example("q", "a")])])


# ---- sequences ----
def test_averages_are_of_scores_that_are_better_high(tmp_path) -> None:
    keys = {**KEYS, "evaluate": "all", "method": "seqlora", "output_dir": str(tmp_path / "run")}
    results = ContinualSequence(load_config(None, keys), kind_tasks("mixed")).run()
    assert results["aside"] == ["sentiment"]
    assert results["scorers"] == ["perplexity", "exact_match"]
    assert results["average_accuracy"] == results["matrix"][-1][1]
    assert all(row[0] > 1 for row in results["matrix"])
    assert "backward_transfer" not in results


def test_the_matrix_without_what_is_aside() -> None:
    scores = {
        (0, 0): 9.0,
        (1, 0): 8.0,
        (1, 1): 50.0,
        (2, 0): 8.5,
        (2, 1): 40.0,
        (2, 2): 60.0,
        (0, 1): 1.0,
        (0, 2): 1.0,
    }
    matrix = Matrix(["text", "a", "b"], scores, aside=frozenset({"text"}))
    assert matrix.average_accuracy() == 50.0
    assert matrix.average_over_time() == 50.0
    assert matrix.backward_transfer() == -10.0
    assert matrix.forgetting() == 10.0
    assert matrix.plasticity() == 55.0


def test_packing_trains_the_same_rows_in_fewer(tmp_path) -> None:
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run"), "train.packing": True, "max_length": 64}
    keys |= {"train.max_steps": -1, "train.save_steps": 100}
    run = ContinualSequence(load_config(None, keys), kind_tasks("prompt"))
    run.run()
    logs = [run.run_dir.log(stage) for stage in (0, 1)]
    assert all(log[-1]["step"] < 3 for log in logs)  # 12 rows in batches of 4


# ---- what a run would train on ----
def test_tasks_check_says_what_is_learnt_of_each_kind(tmp_path, capsys) -> None:
    from pm_llm.cli import main

    chat = {"messages": [turn("user", "a ?"), turn("assistant", "b"), turn("user", "c ?"), turn("assistant", "d")]}
    one = tokenizer("llama")
    one.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    make_model("llama").save_pretrained(tmp_path / "model")
    one.save_pretrained(tmp_path / "model")
    files = [
        file_of(tmp_path, chat, name="chats"),
        file_of(tmp_path, {"text": "a cat ."}, name="texts"),
        file_of(tmp_path, {"prompt": "q ?", "chosen": "yes", "rejected": "no"}, name="pairs"),
    ]
    assert main(["tasks", "check", *files, "--model", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "chats of turns min 4 50% 4 90% 4 99% 4 max 4; 0 with tools, 0 with tool calls" in said
    assert said.count("[[ b </assistant>]]") == 3
    assert said.count("[[d </assistant></s>]]") == 3
    assert "texts: raw text, scorer perplexity\n  train: 5 documents" in said
    assert "<s>[[a cat .</s>]]" in said
    assert "pairs: preference pairs, scorer pair_accuracy\n  train: 5 pairs" in said
    assert "[[ yes</s>]][[ no</s>]]" in said
    assert said.count("tokens carry loss") == 3


def test_t5_takes_prompts_with_answers_only(tmp_path, capsys) -> None:
    from pm_llm.cli import main

    assert main(["tasks", "check", file_of(tmp_path, {"text": "a cat ."}), "--model", "embedded:t5"]) == 2
    assert "raw text can be trained on decoders (LLaMA-like models) only" in capsys.readouterr().err


def test_the_attention_is_the_one_that_is_named(pico_folders) -> None:
    from pm_llm.families.models import load_base

    for name in ("eager", "sdpa"):
        assert load_base(pico_folders["llama"], attn_implementation=name).model.config._attn_implementation == name
    with pytest.raises(PmLlmError, match="attn_implementation is 'none_such'"):
        load_base(pico_folders["llama"], attn_implementation="none_such")


def test_rows_are_grouped_by_length(tmp_path, monkeypatch) -> None:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    made = []
    original = LengthGroupedSampler.__init__
    monkeypatch.setattr(
        LengthGroupedSampler, "__init__", lambda self, *a, **k: (made.append(k), original(self, *a, **k))[1]
    )
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run"), "train.max_steps": 1}
    keys |= {"train.train_sampling_strategy": "group_by_length"}
    ContinualSequence(load_config(None, keys), kind_tasks("prompt")).run()
    assert len(made) == 2
