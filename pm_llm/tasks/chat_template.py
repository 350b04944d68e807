"""A model's chat template: the prompt before an answer, the answer as it ends a turn, and what the template
refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

from pm_llm.errors import PmLlmError, first_line
from pm_llm.tasks.base import Example
from pm_llm.tasks.chats import THOUGHTS, Turn

MARK = "7answer7"
TAG = re.compile(r"<[^<>\s]+>")
LAST = "Train the last answer alone with `loss_on: last`."


def render(tokenizer: Any, turns: Sequence[Turn], tools: Sequence[Any] = (), prompt: bool = False) -> str:
    """The conversation as text; with `prompt`, up to where an answer begins.

    Raises:
        PmLlmError: If there is no template, or it refuses.
    """
    if not tokenizer.chat_template:
        raise PmLlmError(
            "the rows are chats, but the model's tokenizer has no chat template. "
            "Use an instruction-tuned model, or rows with prompt and completion."
        )
    try:
        found: str = tokenizer.apply_chat_template(
            _bare(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return found
    except Exception as error:  # a template is a program of somebody's: jinja raises whatever its expressions do
        roles = {turn["role"] for turn in turns} & {"system", "developer"}
        advice = f" Is it the {roles.pop()} turn? Put its text at the head of the first user turn." if roles else ""
        raise PmLlmError(f"the model's chat template refuses it: {first_line(error)}.{advice}") from error


def _bare(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without what is not the template's."""
    return [{key: x for key, x in turn.items() if key != "weight"} for turn in turns]


def answer_of(tokenizer: Any, example: Example, content: str) -> tuple[str, str, str]:
    """What stands between the generation prompt and an answer, the answer as it ends a turn, and that end.

    `content` is the answer's text; the row's own answer may be a turn with more, such as tool calls.

    What a template puts before an answer, such as Qwen3's empty thoughts, belongs to the prompt: no answer is learnt
    or judged by it. An answer that brings thoughts of its own has none before it. Where the generation prompt opens
    thoughts itself (models distilled to reason), an answer's own thoughts go on from there, and an answer without any
    has them closed before it.
    """
    turns, own = list(example.messages or ()), content == example.completion and example.turn is not None
    before = render(tokenizer, turns, example.tools, prompt=True)
    head, found, tail = render(tokenizer, [*turns, _said(MARK)], example.tools).rpartition(MARK)
    if not found:
        raise PmLlmError("the model's chat template leaves out the answer.")
    answer: Turn = example.turn if own and example.turn is not None else _said(content)
    whole, end = render(tokenizer, [*turns, answer], example.tools), tail.strip()
    if whole.startswith(before):
        between, rest = head[len(before) :] if head.startswith(before) else "", whole[len(before) :].rstrip()
        if between.strip() and rest.startswith(between):
            return between, rest[len(between) :], end
        return "", rest, end
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, head, strict=False)))
    tag = re.fullmatch(r"\s*<([^<>\s]+)>\s*", before[same:])
    said = whole[same:].strip() if own and whole.startswith(head[:same]) else content + end
    if tag is None:
        return "", said, end
    if said.lstrip().startswith(f"<{tag[1]}>"):
        return "", said.lstrip().removeprefix(f"<{tag[1]}>").lstrip("\n"), end
    return f"\n</{tag[1]}>\n\n", said, end


def trained_turns(tokenizer: Any, example: Example, text: str) -> list[tuple[int, int]]:
    """Where in a chat's rendered prompt the earlier turns of the assistant stand that are to be learnt, each with what
    ends it: by the template's own generation marks, else by the renderings of what comes before and after.

    Raises:
        PmLlmError: If the template does not show where a turn stands.
    """
    turns = list(example.messages or ())
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    trained = [i for i in places if turns[i].get("weight") != 0]
    if not trained:
        return []
    marked = _marked(tokenizer, turns, example.tools)
    if marked is not None:
        if len(marked) != len(places):
            raise PmLlmError(f"the model's chat template marks {len(marked)} of {len(places)} assistant turns. {LAST}")
        return [span for i, span in zip(places, marked, strict=True) if i in trained]
    between, _, end = answer_of(tokenizer, example, MARK)
    found = []
    for i in trained:
        start, stop = _span(tokenizer, turns, i, example.tools, text, end)
        found.append((start + len(between) * text.startswith(between, start), stop))
    return found


def _marked(tokenizer: Any, turns: list[Turn], tools: Sequence[Any]) -> list[tuple[int, int]] | None:
    """What the template says are an assistant's turns; None: it says nothing."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, list(tools) or None)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    rendered: Any = render_jinja_template(
        conversations=[_bare(turns)],
        tools=list(tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    spans: list[tuple[int, int]] = [(start, end) for start, end in rendered[1][0] if end > start]
    return spans


def _span(tokenizer: Any, turns: list[Turn], i: int, tools: Sequence[Any], text: str, end: str) -> tuple[int, int]:
    """Where turn `i` stands in `text`: between two renderings that `text` begins with; else, as some templates render
    a turn otherwise once another follows (without its thoughts), where a mark in its place would, or up to what ends
    a turn."""
    before, after = render(tokenizer, turns[:i], tools, prompt=True), render(tokenizer, turns[: i + 1], tools).rstrip()
    if text.startswith(before) and text.startswith(after) and len(before) < len(after):
        return len(before), len(after)
    if "tool_calls" in turns[i]:
        at = text.find(end, len(before)) if end and text.startswith(before) else -1
        return (len(before), at + len(end)) if at >= 0 else _hidden(i)
    marked = [*turns[:i], {**turns[i], "content": MARK}, *turns[i + 1 :]]
    head, found, tail = render(tokenizer, marked, tools, prompt=True).partition(MARK)
    if found and text.startswith(head) and text.endswith(tail):
        stop = len(text) - len(tail)
        rest = tail.lstrip()
        tag = TAG.match(rest)  # where the last turn of a chat ends otherwise
        closing = end if end and rest.startswith(end) else tag[0] if tag else ""
        return len(head), stop + (len(tail) - len(rest) + len(closing) if closing else 0)
    return _hidden(i)


def _hidden(i: int) -> NoReturn:
    raise PmLlmError(f"the model's chat template does not show where turn {i + 1} of the chat stands. {LAST}")


def problem_of(tokenizer: Any, example: Example) -> str | None:
    """Why the model's chat template does not render all of a chat, if it does not."""
    if example.messages is None or not tokenizer.chat_template:
        return None
    turns, tools = list(example.messages), example.tools
    try:
        prompt = render(tokenizer, turns, tools, prompt=True)
        answer_of(tokenizer, example, example.completion)
        if tools and render(tokenizer, turns, (), prompt=True) == prompt:
            return "the model's chat template has no place for its `tools`. Leave them out with `ignore: [tools]`."
        said, open_ended = [*turns, *([example.turn] if example.turn else [])], example.turn is None
        whole = prompt if open_ended else render(tokenizer, said, tools)
        for i, turn in enumerate(said):
            keys = {"tool_calls", *THOUGHTS} if i == len(turns) else {"tool_calls"}  # earlier thoughts few keep
            for key in turn.keys() & keys:
                bare = [*said[:i], {k: x for k, x in turn.items() if k != key}, *said[i + 1 :]]
                if render(tokenizer, bare, tools, prompt=open_ended) == whole:
                    return f"the model's chat template has no place for `{key}`."
            if turn["role"] not in ("user", "assistant") and turn["content"].strip() not in prompt:
                return f"the model's chat template leaves out a turn of the role {turn['role']!r}."
    except PmLlmError as error:
        return str(error)
    return None


def _said(content: str) -> Turn:
    return {"role": "assistant", "content": content}
