"""JSON to a schema: an object or a list of what a short note says, with the right types and values."""

from __future__ import annotations

import json
import random
from itertools import permutations
from typing import Any

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 30, 96, "verified"

NAMES = "Anna Ben Clara David Emma Felix Grace Henry".split()
CITIES = "Lisbon Oslo Prague Vienna Dublin Athens Madrid Warsaw".split()
COLOURS = "red blue green black white yellow".split()
GOODS = "lamp chair kettle mirror carpet shelf".split()


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _exactly(value: Any, kind: str) -> dict[str, Any]:
    return {"type": kind, "enum": [value]}


def _person(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    name, age, city = rng.choice(NAMES), rng.randint(18, 80), rng.choice(CITIES)
    asked_for = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
    right = {"name": _exactly(name, "string"), "age": _exactly(age, "integer"), "city": _exactly(city, "string")}
    return f"{name} is {age} years old and lives in {city}.", _object(asked_for), _object(right)


def _good(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    good, colour, price = rng.choice(GOODS), rng.choice(COLOURS), rng.randint(5, 90)
    sold = rng.random() < 0.5
    asked_for = {"item": {"type": "string"}, "colour": {"type": "string", "enum": COLOURS}}
    asked_for |= {"price": {"type": "integer"}, "sold": {"type": "boolean"}}
    right = {"item": {"type": "string"}, "colour": _exactly(colour, "string")}
    right |= {"price": _exactly(price, "integer"), "sold": _exactly(sold, "boolean")}
    state = "is sold" if sold else "is not sold yet"
    return f"The {colour} {good} costs {price} euros and {state}.", _object(asked_for), _object(right)


def _list(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    names = rng.sample(NAMES, rng.randint(2, 4))
    asked_for = {"type": "array", "items": {"type": "string"}}
    right = {"type": "array", "enum": [list(some) for some in permutations(names)]}
    return (
        f"{', '.join(names[:-1])} and {names[-1]} came to the meeting.",
        _object({"guests": asked_for}),
        _object({"guests": right}),
    )


KINDS = (_person, _good, _list)


def make(rng: random.Random, number: int) -> Example:
    """A note and what is asked for, by schema or in words; the check's own schema holds the right values, too."""
    note, schema, right = KINDS[number % len(KINDS)](rng)
    if number % 2:
        wanted = f"fits the following schema: {json.dumps(schema)}"
    else:
        kinds = {"array": "array of strings"}
        keys = [f"{key} ({kinds.get(x['type'], x['type'])})" for key, x in schema["properties"].items()]
        wanted = f"has {'the keys' if len(keys) > 1 else 'the key'} {', '.join(keys)}"
    text = f"{note}\nWrite this down as one JSON object that {wanted}. Answer with the JSON alone."
    return asked(text, checks=[["json", right]])
