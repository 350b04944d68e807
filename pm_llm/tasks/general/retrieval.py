"""Finding one line among many: a number that was told once, somewhere in a long text."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 24, 24, "verified"

OWNERS = (
    "anna ben clara david emma felix grace henry ida jonas karla leo maria nils olga paul rosa simon tessa victor "
    "wanda yusuf zoe marco"
).split()
FILLERS = (
    "The corridor was swept in the morning.",
    "Nobody had opened the window for days.",
    "A new lamp was put up beside the door.",
    "The lift stopped twice between two floors.",
    "Visitors are asked to sign the book at the desk.",
    "The canteen serves soup on Thursdays.",
)


def make(rng: random.Random, number: int) -> Example:
    """8 to 24 lockers, each with its number, among sentences that say nothing of them."""
    owners = rng.sample(OWNERS, (8, 16, 24)[number % 3])
    codes = dict(zip(owners, rng.sample(range(1000, 10000), len(owners)), strict=True))
    lines = [f"The locker of {name} has the number {code}. {rng.choice(FILLERS)}" for name, code in codes.items()]
    wanted = rng.choice(owners)
    text = "\n".join(lines) + f"\n\nWhich number has the locker of {wanted}? Answer with the number alone."
    return asked(text, checks=[["number", codes[wanted]]])
