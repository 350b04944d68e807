"""Saying a text again, letter by letter."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 24, 96, "verified"

WORDS = (
    "river window candle copper meadow basket pepper violin harvest ladder button cloud anchor marble garden silver "
    "lantern orchard pebble saddle timber walnut bridge feather"
).split()


def _code(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(8))


def make(rng: random.Random, number: int) -> Example:
    """Four to eighteen words, and in every third row codes among them."""
    words = rng.sample(WORDS, rng.randint(4, 18))
    if number % 3 == 2:
        words = [_code(rng) if i % 4 == 1 else word for i, word in enumerate(words[:9])]
    line = " ".join(words)
    return asked(f"Repeat the following line exactly, and write nothing else.\n\n{line}", checks=[["copy", line]])
