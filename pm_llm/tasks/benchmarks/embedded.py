"""The embedded benchmark: five small language tasks generated from a seed, for the embedded models.

Everything is made up here, so the whole loop runs anywhere without data or network: sentiment of a short review,
topic of a headline, questions about animals, which word of a list is of a kind, and what a customer wants. Rows are
distinct, so train and test are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.problems import Problems

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
COLOURS = "red blue green black white yellow brown grey".split()
FACTS = {  # animal -> what it eats, where it lives, what it likes
    "cat": ("fish", "house", "wool"),
    "dog": ("bones", "yard", "sticks"),
    "horse": ("hay", "stable", "races"),
    "rabbit": ("carrots", "burrow", "clover"),
    "fox": ("hens", "forest", "moonlight"),
    "sheep": ("grass", "meadow", "company"),
    "mouse": ("cheese", "cellar", "corners"),
    "goat": ("leaves", "mountain", "cliffs"),
    "bear": ("honey", "cave", "sleep"),
    "duck": ("bread", "pond", "rain"),
}
ANIMALS = list(FACTS)
KINDS = {"colour": COLOURS, "animal": ANIMALS, "name": NAMES}
WISHES = {
    "refund": "money back paid twice charged price".split(),
    "repair": "broken cracked stopped noise leaks".split(),
    "delivery": "parcel late address courier waiting".split(),
    "advice": "recommend choose compare suggest wondering".split(),
}


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


def question(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): a word known about an animal."""
    animal, other = rng.sample(ANIMALS, 2)
    which = rng.randrange(3)
    text = rng.choice(
        [
            "{n} has a {c} {a} . what does it {v} ?",
            "{n} asks : what does a {c} {a} {v} ?",
            "not the {o} , the {c} {a} : what does it {v} ?",
            "the {a} of {n} is {c} . it will {v} what ?",
        ]
    )
    words = {"n": rng.choice(NAMES), "c": rng.choice(COLOURS), "a": animal, "o": other}
    return "answer with one word .", text.format(v=("eat", "live in", "like")[which], **words), FACTS[animal][which]


def puzzle(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): the word of a list that is of a kind."""
    words = {kind: rng.choice(members) for kind, members in KINDS.items()}
    kind = rng.choice(list(KINDS))
    shown = " , ".join(rng.sample(list(words.values()), 3))
    text = rng.choice(["list : {w} . which is the {k} ?", "take {w} . say the {k} .", "{w} . the {k} word ?"])
    return "solve the puzzle .", text.format(w=shown, k=kind), words[kind]


def intent(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, text, label): what a customer wants."""
    label = rng.choice(list(WISHES))
    a, b = rng.sample(WISHES[label], 2)
    text = rng.choice(
        [
            "hello , about my {t} : {a} , and {b} .",
            "this is {n} . {a} ! {b} ! it is the {t} .",
            "the {c} {t} from your market . {a} again , {b} too .",
            "{n} here , {a} and {b} with the {t} .",
        ]
    )
    words = {"n": rng.choice(NAMES), "c": rng.choice(COLOURS), "t": rng.choice(THINGS)}
    return "what does the customer want ?", text.format(a=a, b=b, **words), label


MAKERS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "sentiment": sentiment,
    "topic": topic,
    "question": question,
    "puzzle": puzzle,
    "intent": intent,
}
TASKS = tuple(MAKERS)
ORDERS = {"default": list(MAKERS), "reversed": list(MAKERS)[::-1]}


def load_task(name: str, data_dir: str | None, problems: Problems) -> Task:
    """One task, always with the same rows."""
    return make_task(name)


def make_task(name: str, train: int = TRAIN, test: int = TEST) -> Task:
    """`train` + `test` distinct rows of one task."""
    rng = random.Random(f"{SEED} {name}")
    rows: dict[str, Example] = {}
    while len(rows) < train + test:
        instruction, text, label = MAKERS[name](rng)
        rows[text] = Example(text, label, f"{instruction}\n", "\nanswer :")
    examples = list(rows.values())
    labels = tuple(sorted({row.completion for row in examples}))
    return Task(name, examples[:train], examples[train:], "exact_match", labels)
