"""Chats as people have them: turns, tools, parts and weights reach the template, or are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Example
from pm_llm.tasks.chat_template import problem_of
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks
from tests.conftest import DECODER, tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<assistant> {% endif %}"
TOOLS = (
    "{% if tools %}tools : {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls or [] %} call {{ c.function.name }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x"}}}
TURNS = [
    {"role": "user", "content": "weather ?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "it is sunny"},
]


def rows_of(tmp_path, row: dict) -> list[Example]:
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 10)
    (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / "a.jsonl")]))
    return list(task.train)


def test_tools_and_calls_reach_the_template_or_the_row_is_refused(tmp_path) -> None:
    row = rows_of(tmp_path, {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "weather"}}]})[0]
    t = tokenizer("llama")
    t.chat_template = TOOLS
    assert problem_of(t, row) is None
    prompt = t.decode(Encoder(t, DECODER, 400, 8).prompt(row))
    assert prompt.startswith("tools : [")
    assert "<assistant>  call weather<tool> sunny<assistant> " in prompt
    t.chat_template = PLAIN
    assert "no place for its `tools`" in problem_of(t, row)
    assert "no place for `tool_calls`" in problem_of(t, replace(row, tools=()))
    t.chat_template = PLAIN.replace(
        "<{{ m.role }}>", "{% if m.role == 'tool' %}{% continue %}{% endif %}<{{ m.role }}>"
    )
    bare = replace(row, tools=(), messages=tuple(m for m in row.messages if "tool_calls" not in m))
    assert "a turn of the role 'tool'" in problem_of(t, bare)


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            [("user", "q")],
            "a",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ]
            },
            [("user", "qr")],
            "a",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})},
                    {"from": "observation", "value": "x"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [("user", "q"), ("assistant", ""), ("tool", "x")],
            "a",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "good", "weight": 1},
                    {"role": "user", "content": "r"},
                    {"role": "assistant", "content": "bad", "weight": 0},
                ]
            },
            [("user", "q")],
            "good",
        ),
        (
            {"instruction": "r", "input": "", "output": "a", "system": "s", "history": [["q", "b"]]},
            [("system", "s"), ("user", "q"), ("assistant", "b"), ("user", "r")],
            "a",
        ),
    ],
)
def test_turns_are_taken_whole(row: dict, messages: list, answer: str, tmp_path) -> None:
    found = rows_of(tmp_path, row)[0]
    assert [(m["role"], m["content"]) for m in found.messages] == messages
    assert found.completion == answer
    assert not any("weight" in m for m in found.messages)


USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([USER, {**SAID, "weight": 0}], "`weight` is 0"),
        ([USER, {**SAID, "weight": 0.5}], "weight 0.5; it must be 0"),
        ([USER, {**SAID, "train": False}], "has 'train', which is not known"),
        ([{**USER, "tool_calls": [CALL]}, SAID], "tool_calls of the role user"),
        ([{"role": "narrator", "content": "q"}, SAID], "has the role 'narrator'"),
        ([{"from": "function_call", "value": "{}"}, SAID], "a function_call turn"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, SAID], "a part that is no text"),
        ([USER], "must end with an assistant turn"),
    ],
)
def test_what_of_a_turn_cannot_be_used_is_named(turns: list, said: str, tmp_path) -> None:
    with pytest.raises(PmLlmError) as error:
        rows_of(tmp_path, {"messages": turns})
    assert said in str(error.value)


def test_what_was_said_before_stands_in_the_prompt_where_there_is_no_template(tmp_path) -> None:
    row = rows_of(tmp_path, {"instruction": "r", "output": "a", "system": "s", "history": [["q", "b"]]})[0]
    t = tokenizer("llama")
    assert t.decode(Encoder(t, DECODER, 64, 8).prompt(row), skip_special_tokens=True) == "s\n\nq\n\nb\n\nr"
    t.chat_template = PLAIN
    assert t.decode(Encoder(t, DECODER, 64, 8).prompt(row)).startswith("<system> s\n<user> q\n<assistant> b\n")


def test_thoughts_that_the_generation_prompt_opens_are_closed_once() -> None:
    """As the templates of models distilled to reason do; they take an answer's own thoughts out of the turn."""
    t = tokenizer("llama")
    t.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant> <think>\n{% endif %}"
    )
    encoder = Encoder(t, DECODER, 96, 40)
    for answer, between, said in (
        ("fish", "\n</think>\n\n", "fish</s>"),
        ("<think>\nthe cat\n</think>\nfish", "", "the cat\n</think>\nfish</s>"),
    ):
        row = Example("", answer, messages=(USER,))
        assert t.decode(encoder.prompt(row)) == "<user> q</s><assistant> <think>\n" + between
        assert t.decode(encoder.answer(row)) == said


def test_an_end_mark_that_is_no_token_is_not_part_of_what_was_said() -> None:
    t = tokenizer("llama")
    t.chat_template = PLAIN.replace("{{ m.content }}\n", "{{ m.content }}<|im_end|>\n")
    encoder, row = Encoder(t, DECODER, 96, 24), Example("", "fish", messages=(USER,))
    ids = encoder.answer(row)
    assert t.decode(ids) == "fish<|im_end|></s>"
    assert encoder.said(row, encoder.prompt(row), ids) == "fish"


def test_long_chats_and_refused_ones_are_dropped_where_that_is_asked_for(pico_folders, tmp_path, capsys) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(pico_folders["llama"], folder)
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + "{{ m.content }}{% endfor %}")
    long = [{"role": "user", "content": "word " * 300}, SAID, USER, SAID]
    chats = [
        long if i == 1 else [{"role": "system", "content": "s"}, USER, SAID] if i == 4 else [USER, SAID]
        for i in range(40)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = RunConfig(model=str(folder), tasks=[str(tmp_path / "c.jsonl")], max_length=64)
    tasks = load_tasks(config)
    with pytest.raises(PmLlmError, match="2 things are wrong"):
        encoders_for(config, tasks)
    encoders, fitting = encoders_for(replace(config, bad_rows="drop"), tasks)
    found = fitting(tasks[0])
    assert len(found.train) + len(found.test) == 38
    assert "2 bad rows left out" in capsys.readouterr().out
    assert encoders["c"].features(found.train)
