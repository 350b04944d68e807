"""Arithmetic in words: one or two steps with small whole numbers."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 40, 96, "verified"

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas".split()
THINGS = "apples pencils stamps marbles postcards eggs buttons tickets".split()


def _sum(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b = rng.randint(3, 40), rng.randint(3, 40)
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b


def _difference(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b = rng.randint(20, 60), rng.randint(3, 19)
    return f"{name} has {a} {thing} and gives {b} of them away. How many {thing} are left?", a - b


def _product(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b = rng.randint(2, 9), rng.randint(3, 12)
    return f"{name} buys {a} boxes with {b} {thing} in each. How many {thing} are that in all?", a * b


def _quotient(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{name} shares {a * b} {thing} equally among {a} children. How many does each child get?", b


def _two_steps(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b, c = rng.randint(2, 6), rng.randint(3, 10), rng.randint(1, 5)
    text = f"{name} has {a} bags with {b} {thing} in each, and loses {c} of the {thing}. How many {thing} are left?"
    return text, a * b - c


KINDS = (_sum, _difference, _product, _quotient, _two_steps)


def make(rng: random.Random, number: int) -> Example:
    """A question; the last number of the answer is what counts."""
    text, value = KINDS[number % len(KINDS)](rng, rng.choice(NAMES), rng.choice(THINGS))
    return asked(f"{text} End your answer with the number alone.", checks=[["number", value]])
