"""Chats as people write them, as the turns that a chat template takes: nothing of a turn is left out unsaid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pm_llm.tasks.files import Row, short
from pm_llm.tasks.problems import Problems

Turn = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# other names of them, as ShareGPT and its kin have
OTHER_ROLES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response", "function"), "tool"),
}
CALL = ("function_call", "tool_call")  # roles of a turn that is a call
THOUGHTS = ("reasoning_content", "thinking")  # as templates of reasoning models call them
KEYS = {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "weight", *THOUGHTS}


def chat_of(row: Row, column: str, given: Any, problems: Problems) -> list[Turn] | None:
    """The turns in `given`, a row's `column`; None, with the reason in `problems`, if they cannot be used whole."""
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(turn, dict) for turn in given):
        problems.row(row.place, f"{column} must be a list of turns with `role` and `content`.")
        return None
    turns = []
    for turn in given:
        found = _turn(turn, column)
        if isinstance(found, str):
            problems.row(row.place, found)
            return None
        text = found.get("content")
        if text is not None and row.check_text(text, "content", problems) is None:
            return None
        turns.append(found)
    return turns


def up_to_answer(turns: Sequence[Turn]) -> tuple[list[Turn], Turn] | str:
    """The turns before the last answer that is to be learnt, and that turn; or why there is none.

    Turns after it, which no loss is on (`weight: 0`), do not matter to it.
    """
    ends = list(turns)
    while ends and turns[-1].get("weight") == 0 and (ends[-1]["role"] != "assistant" or ends[-1].get("weight") == 0):
        ends.pop()
    if len(ends) < 2 or ends[-1]["role"] != "assistant":
        if len(ends) < len(turns):
            return "no assistant turn of it is trained: `weight` is 0. Leave the row out."
        return "a chat must end with an assistant turn after at least one other."
    return ends[:-1], {key: x for key, x in ends[-1].items() if key != "weight"}


def text_of(turn: Turn) -> str:
    """All that an answer says, as text; what a template makes of it is another matter."""
    thoughts = [turn[key] for key in THOUGHTS if key in turn]
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join(part for part in (*thoughts, turn["content"], *calls) if part)


def _turn(turn: Turn, column: str) -> Turn | str:
    """One turn with the usual names; or what is wrong with it."""
    turn = {key: x for key, x in turn.items() if x is not None}  # of tables, in which every turn has all columns
    unknown = sorted(map(str, turn.keys() - KEYS))
    if unknown:
        return f"a turn of {column} has {unknown[0]!r}, which is not known here. Known: {', '.join(sorted(KEYS))}."
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        return f"each turn of {column} needs `role` and `content`; one is {short(turn)}."
    if role in CALL:
        call = _call(content)
        return call or f"a {role} turn of {column} must be JSON with `name` and `arguments`; one is {short(content)}."
    role = OTHER_ROLES.get(role, role)
    if role not in ROLES:
        return f"a turn of {column} has the role {role!r}. Known: {', '.join([*ROLES, *OTHER_ROLES, *CALL])}."
    if isinstance(content, (list, tuple)):
        other = next((p for p in content if not (isinstance(p, dict) and isinstance(p.get("text"), str))), None)
        if other is not None:
            return f"a turn of {column} has a part that is no text: {short(other)}. Only text parts can be used."
        content = "".join(part["text"] for part in content)
    if content is None and not turn.get("tool_calls"):
        return f"each turn of {column} needs `role` and `content`; one is {short(turn)}."
    given = turn.get("tool_calls") or ()
    calls = [_called(call) for call in given] if isinstance(given, (list, tuple)) else [None]
    if None in calls or (calls and role != "assistant"):
        what = f"tool_calls of the role {role}" if None not in calls else f"a tool call {short(given)}"
        return f"a turn of {column} has {what}; an assistant calls, by `name` and `arguments` (a mapping)."
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        return f"a turn of {column} has weight {weight!r}; it must be 0 (not trained) or 1."
    found: Turn = {"role": role, "content": content if content is not None else ""}
    found |= {key: turn[key] for key in ("name", "tool_call_id", *THOUGHTS) if turn.get(key)}
    if calls:
        found["tool_calls"] = calls
    return found if weight else {**found, "weight": 0}


def _call(content: Any) -> Turn | None:
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    found = _called(call)
    return found and {"role": "assistant", "content": "", "tool_calls": [found]}


def _called(call: Any) -> Turn | None:
    """A call as templates want it, with its arguments as a mapping; as OpenAI writes them they are JSON text."""
    if not isinstance(call, dict) or not isinstance(call.get("function", call), dict):
        return None
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments", {})
    try:
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    more = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tools_of(row: Row, problems: Problems) -> tuple[Any, ...] | None:
    """The row's `tools`: a list of JSON schemas, or their JSON; None, with the reason in `problems`, if it is none."""
    given = row.values.get("tools")
    try:
        found = json.loads(given) if isinstance(given, str) and given.strip() else given
    except (ValueError, RecursionError):
        found = False
    if not found and found is not False:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        problems.row(row.place, f"tools is {short(given)}; it must be a list of JSON schemas.")
        return None
    return tuple(found)
