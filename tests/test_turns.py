"""Which tokens of a chat are learnt: all turns of the assistant, or the last, under real templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trl

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.answering import _references
from pm_llm.evaluation.scorers import score
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.chat_template import _marked, answer_of, problem_of, render, trained_turns
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks
from tests.conftest import DECODER, tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PICTURES = {"idefics3", "smolvlm", "llava_next"}  # whose turns are lists of parts
NAMES = sorted(p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith("_training"))
# where the template says otherwise what the last turn of a chat ends with
OTHER_END = {"phi3", "phi3_5", "gptoss", "glm4moe"}
WEATHER = {"name": "weather", "arguments": {"city": "x"}}
CALL = {"type": "function", "function": WEATHER}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TURNS = (
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "it is a cat ."},
    {"role": "user", "content": "and now ?"},
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str):
    found = tokenizer("llama")
    found.chat_template = template
    return found


def learnt(template: str, example: Example) -> list[str]:
    one = with_template(template)
    text = render(one, example.messages, example.tools, prompt=True)
    return [text[a:b] for a, b in trained_turns(one, example, text)]


@pytest.mark.parametrize("name", NAMES)
def test_real_templates_show_where_each_turn_stands(name: str) -> None:
    example = Example("", "a dog .", messages=TURNS)
    template = (TEMPLATES / f"{name}.jinja").read_text()
    if name in PICTURES:
        assert problem_of(with_template(template), example) is not None
        return
    assert problem_of(with_template(template), example) is None
    (turn,), last = learnt(template, example), answer_of(with_template(template), example, "a dog .")[1]
    assert turn.startswith("it is a cat .")
    assert last.startswith("a dog .")
    marked = TEMPLATES / f"{name}_training.jinja"
    if marked.exists():  # the same model's, with marks: they cover what is found without, but for what ends a line
        one = with_template(marked.read_text())
        whole = [*TURNS, {"role": "assistant", "content": "a dog ."}]
        pieces = [render(one, whole, prompt=True)[a:b] for a, b in _marked(one, whole, [])]
        half = len(pieces) // 2
        first, second = "".join(pieces[:half]).strip(), "".join(pieces[half:]).strip()
        assert first.endswith(turn.strip()) or name in OTHER_END
        assert second.endswith(last.strip()) or name in OTHER_END


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "glm4moe", "gptoss", "cohere2"])
def test_calls_are_learnt_as_the_template_writes_them(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    told = {"role": "tool", "name": "weather", "content": "sunny"}
    example = Example("", "x", messages=(TURNS[0],), turn=calls, tools=(TOOL,))
    one = with_template(template)
    refused = problem_of(one, example)
    if refused is not None:
        assert "no place for" in refused or "refuses it" in refused
        return
    answer = answer_of(one, example, "x")[1]
    assert "weather" in answer
    assert "city" in answer
    later = Example("", "sunny .", messages=(TURNS[0], calls, told), tools=(TOOL,))
    (turn,) = learnt(template, later)
    assert "city" in turn
    assert "sunny" not in turn


def test_all_turns_are_learnt_but_those_of_weight_0_or_the_last_alone() -> None:
    turns = (*TURNS, {"role": "assistant", "content": "no .", "weight": 0}, {"role": "user", "content": "well ?"})
    example = Example("", "yes .", messages=turns)
    one = with_template(CHATML)

    def said(loss_on: str) -> str:
        (row,) = Encoder(one, DECODER, 400, 80, loss_on=loss_on).features([example])
        assert len(row["labels"]) == len(row["input_ids"])
        assert all(label in (-100, i) for label, i in zip(row["labels"], row["input_ids"], strict=True))
        return one.decode([x for x in row["labels"] if x != -100])

    assert said("last") == one.decode(
        [*one("yes .<|im_end|>", add_special_tokens=False)["input_ids"], one.eos_token_id]
    )
    assert said("assistant").startswith("it is a cat .")
    assert "no ." not in said("assistant")
    assert said("assistant").endswith(said("last"))


def test_learning_earlier_turns_changes_no_prompt_of_a_chat() -> None:
    example, one = Example("", "a dog .", messages=TURNS), with_template(CHATML)
    prompts = [one.decode(Encoder(one, DECODER, 400, 8, loss_on=how).prompt(example)) for how in ("assistant", "last")]
    assert prompts[0] == prompts[1]


def test_a_template_that_hides_a_turn_is_refused_with_what_to_do(tmp_path) -> None:
    hidden = CHATML.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else m.content | upper }}"
    )
    with pytest.raises(PmLlmError, match=r"does not show where turn 2 of the chat stands\. .*loss_on: last"):
        learnt(hidden, Example("", "a dog .", messages=TURNS))
    system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    told = Example("", "a", messages=({"role": "system", "content": "be kind"}, TURNS[0]))
    assert "System role not supported. Is it the system turn? Put" in problem_of(with_template(system), told)


def loaded(tmp_path, row: dict, **keys) -> Task:
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 10)
    (task,) = load_tasks(RunConfig(tasks=[{"data": str(tmp_path / "a.jsonl"), **keys}]))
    return task


def test_a_call_is_an_answer_and_scored_as_one(tmp_path) -> None:
    arguments = {"function": {"name": "weather", "arguments": json.dumps(WEATHER["arguments"])}}  # as OpenAI has it
    said = {"role": "assistant", "content": None, "tool_calls": [arguments]}
    task = loaded(tmp_path, {"messages": [TURNS[0], said], "tools": [TOOL]}, scorer="tool_call")
    row = task.test[0]
    assert row.turn == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    one = with_template("{% if tools %}tools{% endif %}" + CHATML)
    encoder = Encoder(one, DECODER, 400, 80)
    (reference,) = _references(encoder, row)
    assert '"city"' in reference.replace(" ", "") or "city" in reference
    whole = '<tool_call>{"name": "weather", "arguments": {"city": "x"}}</tool_call>'
    other = 'Well.\n{"type": "function", "function": {"name": "weather", "parameters": {"city": "x"}}}'
    wrong = whole.replace('"x"', '"y"')
    assert score("tool_call", [whole, other, wrong, "it is sunny"], [[whole]] * 4) == 50.0
    assert score("tool_call", ["no call", whole], [["none"], ["none"]]) == 50.0


@pytest.mark.parametrize(
    ("calls", "said"),
    [(5, "a tool call 5"), (["f"], "a tool call"), ([{"function": {"name": "f", "arguments": "{"}}], "a tool call")],
)
def test_what_is_no_call_is_told(tmp_path, calls, said) -> None:
    with pytest.raises(PmLlmError, match=said):
        loaded(tmp_path, {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": calls}]})


def test_loss_on_must_be_known(tmp_path) -> None:
    with pytest.raises(PmLlmError, match="loss_on is 'all'; it must be assistant"):
        loaded(tmp_path, {"messages": [TURNS[0], TURNS[1]]}, loss_on="all")


def test_a_run_says_which_turns_it_learnt() -> None:
    from pm_llm.run.going_on import _learnt

    chats, plain = [Example("", "a", messages=TURNS)], [Example("q", "a")]
    assert _learnt(Task("t", chats, chats)) == ["assistant"]
    assert _learnt(Task("t", chats, chats, loss_on="last")) == []
    assert _learnt(Task("t", plain, plain)) == []


def test_encoders_know_it(tmp_path, monkeypatch) -> None:
    task = loaded(tmp_path, {"messages": [*TURNS, {"role": "assistant", "content": "a dog ."}]}, loss_on="last")
    one = with_template(CHATML)
    monkeypatch.setattr("pm_llm.families.models.load_tokenizer", lambda name: (one, DECODER))
    encoders, _ = encoders_for(RunConfig(), [task])
    assert encoders[task.name].loss_on == "last"
