"""Tool calls: which function to call with which arguments, and when to call none.

The functions stand in the question itself, so that a model without a place for tools in its chat template is asked the
same as any other.
"""

from __future__ import annotations

import json
import random
from typing import Any

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 30, 64, "tool_call"

CITIES = "Lisbon Oslo Prague Vienna Dublin Athens Madrid Warsaw".split()
NAMES = "anna ben clara david emma felix".split()
TITLES = ("the dentist", "a team lunch", "the school concert", "a bike repair", "the tax form")
TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Today's weather of a city.", {"city": "string"}),
    "convert": ("Convert an amount of money.", {"amount": "integer", "source": "string", "target": "string"}),
    "set_timer": ("Set a timer.", {"minutes": "integer"}),
    "send_message": ("Send a text to a contact.", {"to": "string", "text": "string"}),
    "add_event": ("Put something into the calendar.", {"title": "string", "day": "string"}),
}
DAYS = "Monday Tuesday Wednesday Thursday Friday".split()
PLAIN = ("What is the opposite of hot?", "Say hello in one word.", "Which letter comes after B?", "Name a colour.")


def _call(rng: random.Random, name: str) -> tuple[str, dict[str, Any]]:
    if name == "get_weather":
        city = rng.choice(CITIES)
        return f"What is the weather like in {city}?", {"city": city}
    if name == "convert":
        amount, (source, target) = rng.randint(5, 500), rng.sample(["EUR", "USD", "GBP", "JPY"], 2)
        return f"How much are {amount} {source} in {target}?", {"amount": amount, "source": source, "target": target}
    if name == "set_timer":
        minutes = rng.randint(2, 59)
        return f"Wake me in {minutes} minutes.", {"minutes": minutes}
    if name == "send_message":
        to, text = rng.choice(NAMES), rng.choice(["I am late", "see you soon", "thank you", "call me back"])
        return f'Send {to} the text "{text}".', {"to": to, "text": text}
    title, day = rng.choice(TITLES), rng.choice(DAYS)
    return f'Put "{title}" into my calendar for {day}.', {"title": title, "day": day}


def make(rng: random.Random, number: int) -> Example:
    """A wish and three functions; of six wishes one needs none."""
    names = list(TOOLS)
    name = names[number % 6] if number % 6 < len(names) else None
    offered = rng.sample([one for one in names if one != name], 3 if name is None else 2) + ([name] if name else [])
    rng.shuffle(offered)
    wish, arguments = (rng.choice(PLAIN), {}) if name is None else _call(rng, name)
    lines = [json.dumps({"name": n, "description": TOOLS[n][0], "parameters": TOOLS[n][1]}) for n in offered]
    text = (
        "You may call these functions:\n"
        + "\n".join(lines)
        + "\nIf one of them serves the wish, answer with one JSON "
        'object alone: {"name": ..., "arguments": {...}}. If none does, answer in plain words.\n\nWish: ' + wish
    )
    return asked(text, answer="plain words" if name is None else json.dumps({"name": name, "arguments": arguments}))
