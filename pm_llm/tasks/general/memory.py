"""What was said earlier in a conversation."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 30, 32, "verified"

TOLD = {
    "My name is {x}.": ("What is my name?", "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas".split()),
    "I have a dog called {x}.": ("What is my dog called?", "Bruno Luna Rocky Stella Bello Fiona Max".split()),
    "My favourite colour is {x}.": ("What is my favourite colour?", "red blue green yellow purple orange".split()),
    "I live in {x}.": ("In which city do I live?", "Lisbon Oslo Prague Vienna Dublin Athens".split()),
    "I was born in {x}.": ("In which month was I born?", "January March April June August October".split()),
    "I work as a {x}.": ("What do I work as?", "baker teacher nurse farmer pilot gardener".split()),
}
BETWEEN = (
    ("What is two plus two?", "Four."),
    ("Which day comes after Monday?", "Tuesday."),
    ("Say something nice about the sea.", "The sea is wide and calm today."),
    ("How many hours has a day?", "A day has 24 hours."),
    ("What is the opposite of cold?", "Hot."),
)


def make(rng: random.Random, number: int) -> Example:
    """Two things are told, up to three other questions asked and answered, then one of the two is asked for."""
    first, second = rng.sample(list(TOLD), 2)
    wanted = rng.choice([first, second])
    values = {told: rng.choice(TOLD[told][1]) for told in (first, second)}
    turns = [f"{first.format(x=values[first])} {second.format(x=values[second])}", "Thank you, I will remember that."]
    for question, answer in rng.sample(BETWEEN, number % 4):
        turns += [question, answer]
    return asked(*turns, TOLD[wanted][0], checks=[["equals", [values[wanted]]]])
