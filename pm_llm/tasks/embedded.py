"""The embedded benchmark: five small language tasks generated from a seed, for the embedded models.

Everything is made up here, so the whole loop runs anywhere without data or network: sentiment of a short review,
topic of a headline, where somebody is in a short story, which word of a list is asked for, and whether a statement
follows from a description. Rows are distinct, so train and test are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pm_llm.tasks import Example, Task, pick_order

TRAIN, TEST, SEED = 480, 120, 20250522

GOOD = "wonderful superb delightful charming brilliant lovely excellent pleasant fresh perfect graceful tasty".split()
BAD = "awful dreadful boring ugly broken terrible poor nasty stale horrible clumsy bland".split()
THINGS = "film soup hotel song book garden lamp jacket concert play cake train bridge picture market chair".split()
TOPICS = {
    "sport": "goalkeeper match referee striker tournament stadium penalty coach sprint medal".split(),
    "music": "violin singer melody orchestra drummer album chorus pianist rhythm trumpet".split(),
    "science": "telescope atom laboratory planet microscope theory molecule experiment gravity fossil".split(),
    "food": "baker oven pepper recipe kitchen noodle dessert butter salad grill".split(),
}
NAMES = "anna ben clara david emma felix grace henry".split()
PLACES = "kitchen garden library office cellar school park station".split()
COLOURS = "red blue green black white yellow brown grey".split()
ANIMALS = "cat dog horse rabbit fox sheep mouse goat".split()
WORDS = COLOURS + ANIMALS + THINGS
POSITIONS = ("first", "second", "last")


def sentiment(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): positive or negative."""
    good = rng.random() < 0.5
    word, other = rng.sample(GOOD if good else BAD, 2)
    thing = rng.choice(THINGS)
    text = rng.choice(
        [
            f"the {thing} was {word} and {other} .",
            f"we found the {thing} {word} , and the rest {other} too .",
            f"everybody said that the {thing} is {word} . i call it {other} .",
            f"such a {word} {thing} ! it felt {other} .",
        ]
    )
    return "what is the sentiment of this review ?", text, "positive" if good else "negative"


def topic(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): one of the four topics."""
    label = rng.choice(list(TOPICS))
    a, b = rng.sample(TOPICS[label], 2)
    text = rng.choice(
        [
            f"the {a} and the {b} were in the news today .",
            f"a report on the {a} , with a word about the {b} .",
            f"what the {b} has to do with the {a} .",
            f"new {a} , old {b} : {rng.choice(NAMES)} tells the story .",
        ]
    )
    return "what is the topic of this headline ?", text, label


def place(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): a place named in the story."""
    people, places = rng.sample(NAMES, 3), rng.sample(PLACES, 3)
    moves = [
        rng.choice([f"{p} is in the {q} .", f"{p} went to the {q} ."]) for p, q in zip(people, places, strict=True)
    ]
    asked = rng.randrange(3)
    return "answer with one word .", " ".join(moves) + f" where is {people[asked]} ?", places[asked]


def puzzle(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): the word of a list at a position."""
    words = rng.sample(WORDS, 3)
    which = rng.randrange(3)
    text = rng.choice(["list : {w} . which word is {p} ?", "take {w} . say the {p} one .", "{w} . the {p} word ?"])
    return "solve the puzzle .", text.format(w=" , ".join(words), p=POSITIONS[which]), words[which]


def follows(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): yes or no."""
    (a, b), (c, d) = rng.sample(ANIMALS, 2), rng.sample(COLOURS, 2)
    yes = rng.random() < 0.5
    asked = rng.choice([(a, c), (b, d)]) if yes else rng.choice([(a, d), (b, c)])
    text = rng.choice(
        [
            f"the {a} is {c} and the {b} is {d} . claim : the {asked[0]} is {asked[1]} .",
            f"there is a {c} {a} and a {d} {b} . claim : the {asked[0]} is {asked[1]} .",
        ]
    )
    return "is the claim true ?", text, "yes" if yes else "no"


MAKERS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "sentiment": sentiment,
    "topic": topic,
    "place": place,
    "puzzle": puzzle,
    "follows": follows,
}
ORDERS = {"default": list(MAKERS), "reversed": list(MAKERS)[::-1]}


def load(order: str | Sequence[str] | None, data_dir: str | None = None) -> list[Task]:
    """The tasks of `default` or `reversed`, or of a list of names. Always the same rows."""
    return [make_task(name) for name in pick_order(order, ORDERS, list(MAKERS))]


def make_task(name: str, train: int = TRAIN, test: int = TEST) -> Task:
    """`train` + `test` distinct rows of one task."""
    rng = random.Random(f"{SEED} {name}")
    rows: dict[str, Example] = {}
    while len(rows) < train + test:
        instruction, text, label = MAKERS[name](rng)
        rows[text] = Example(text, label, f"{instruction}\n", "\nanswer :")
    examples = list(rows.values())
    return Task(name, examples[:train], examples[train:], "exact_match")
