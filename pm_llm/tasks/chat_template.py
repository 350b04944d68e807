"""A model's chat template: the prompt before an answer, the answer as it ends a turn, and what the template
refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from pm_llm.errors import PmLlmError, first_line
from pm_llm.tasks.base import Example

MARK = "7answer7"


def render(tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Sequence[Any] = (), prompt: bool = False) -> str:
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
            list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return found
    except Exception as error:  # a template is a program of somebody's: jinja raises whatever its expressions do
        raise PmLlmError(f"the model's chat template refuses it: {first_line(error)}.") from error


def answer_of(tokenizer: Any, example: Example, content: str) -> tuple[str, str, str]:
    """What stands between the generation prompt and an answer, the answer `content` as it ends a turn, and that end.

    What a template puts before an answer, such as Qwen3's empty thoughts, belongs to the prompt: no answer is learnt
    or judged by it. An answer that brings thoughts of its own has none before it. Where the generation prompt opens
    thoughts itself (models distilled to reason), an answer's own thoughts go on from there, and an answer without any
    has them closed before it.
    """
    turns = list(example.messages or ())
    before = render(tokenizer, turns, example.tools, prompt=True)
    head, found, tail = render(tokenizer, [*turns, _said(MARK)], example.tools).rpartition(MARK)
    if not found:
        raise PmLlmError("the model's chat template leaves out the answer.")
    whole, end = render(tokenizer, [*turns, _said(content)], example.tools), tail.strip()
    if whole.startswith(before):
        between, rest = head[len(before) :] if head.startswith(before) else "", whole[len(before) :].rstrip()
        if between.strip() and rest.startswith(between):
            return between, rest[len(between) :], end
        return "", rest, end
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    opened = before[sum(1 for _ in same) :]
    tag = re.fullmatch(r"\s*<([^<>\s]+)>\s*", opened)
    if tag is None:
        return "", content + end, end
    own = content.lstrip()
    if own.startswith(f"<{tag[1]}>"):
        return "", own.removeprefix(f"<{tag[1]}>").lstrip("\n") + end, end
    return f"\n</{tag[1]}>\n\n", content + end, end


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
        for i, turn in enumerate(turns):
            if "tool_calls" in turn:
                bare = [*turns[:i], {k: x for k, x in turn.items() if k != "tool_calls"}, *turns[i + 1 :]]
                if render(tokenizer, bare, tools, prompt=True) == prompt:
                    return "the model's chat template has no place for `tool_calls`."
            if turn["role"] not in ("user", "assistant") and turn["content"].strip() not in prompt:
                return f"the model's chat template leaves out a turn of the role {turn['role']!r}."
    except PmLlmError as error:
        return str(error)
    return None


def _said(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
