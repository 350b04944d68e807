"""Instructions whose outcome a program can tell: length, form, language, words and their order (17 kinds).

The idea is that of IFEval (Zhou et al., arXiv 2311.07911); the rows and the checks are the project's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

ROWS, NEW_TOKENS, SCORER = 51, 96, "verified"

TOPICS = (
    *("a rainy day", "an old bridge", "a vegetable garden", "the harbour at night", "learning to swim"),
    *("a railway station", "a good breakfast", "the first snow", "a public library", "a long walk", "a market hall"),
    *("the wind", "a small workshop", "an evening with friends", "a lighthouse", "a bicycle tour", "a bakery"),
)
WORDS = "river window candle copper meadow basket pepper violin harvest ladder button cloud".split()
STARTS = ("Well then", "To begin with", "Most people", "In my view")
ENDS = ("and that is all", "as everybody knows", "until next time", "so much for that")
LANGUAGES = ("German", "French", "Spanish")
Rule = Callable[[random.Random], tuple[str, list[object]]]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(WORDS, count)


def _at_most(rng: random.Random) -> tuple[str, list[object]]:
    count = rng.choice([8, 12, 15, 20])
    return f"Use at least 5 and at most {count} words.", ["at_most", count]


def _at_least(rng: random.Random) -> tuple[str, list[object]]:
    count = rng.choice([25, 30, 35])
    return f"Use at least {count} words.", ["at_least", count]


def _sentences(rng: random.Random) -> tuple[str, list[object]]:
    count = rng.choice([1, 2, 3])
    return f"Your answer must have exactly {count} sentence{'s' * (count > 1)}.", ["sentences", count]


def _includes(rng: random.Random) -> tuple[str, list[object]]:
    a, b = _words(rng, 2)
    return f"Your answer must contain the words {a} and {b}.", ["includes", [a, b]]


def _avoids(rng: random.Random) -> tuple[str, list[object]]:
    return "Do not use the words the, is or of.", ["avoids", ["the", "is", "of"]]


def _starts(rng: random.Random) -> tuple[str, list[object]]:
    start = rng.choice(STARTS)
    return f'Begin your answer with the words "{start}".', ["starts", start]


def _ends(rng: random.Random) -> tuple[str, list[object]]:
    end = rng.choice(ENDS)
    return f'End your answer with the words "{end}", and write nothing after them.', ["ends", end]


def _list(rng: random.Random) -> tuple[str, list[object]]:
    count = rng.choice([2, 3, 4])
    return f"Answer with a list of exactly {count} points, each on a line that begins with a hyphen and a blank.", [
        "list",
        count,
    ]


def _lines(rng: random.Random) -> tuple[str, list[object]]:
    count = rng.choice([2, 3, 4])
    return f"Answer with exactly {count} lines of text.", ["lines", count]


def _ordered(rng: random.Random) -> tuple[str, list[object]]:
    some = _words(rng, 3)
    return f"Use the words {some[0]}, {some[1]} and {some[2]}, in this order.", ["ordered", some]


def _language(rng: random.Random) -> tuple[str, list[object]]:
    name = rng.choice(LANGUAGES)
    return f"Write your whole answer in {name}.", ["language", name]


def _without(mark: str, name: str) -> Rule:
    return lambda rng: (f"Do not use any {name} in your answer.", ["without", mark])


def _fixed(text: str, check: str) -> Rule:
    return lambda rng: (text, [check])


RULES: tuple[Rule, ...] = (
    *(_at_most, _at_least, _sentences, _includes, _avoids, _starts, _ends, _list, _lines, _ordered, _language),
    *(_without(",", "comma"), _without("!", "exclamation mark")),
    _fixed("Write in lowercase letters only, without a single capital letter.", "lower"),
    _fixed("Write in CAPITAL LETTERS only.", "upper"),
    _fixed("Put your whole answer in double quotation marks.", "quoted"),
    _fixed("Give it a title in double angle brackets, such as <<my title>>.", "titled"),
)


def make(rng: random.Random, number: int) -> Example:
    """A topic and a rule; the rules take turns. No answer that is cut is right, and none that is hardly one."""
    text, check = RULES[number % len(RULES)](rng)
    texts, checks = [text], [check]
    if check[0] == "at_most":
        checks.append(["at_least", 5])
    elif check[0] != "at_least":
        checks += [["at_least", 5], ["at_most", 40]]
        texts.append("Use at least 5 and at most 40 words.")
    return asked(f"Write something about {rng.choice(TOPICS)}. {' '.join(texts)}", checks=checks)
