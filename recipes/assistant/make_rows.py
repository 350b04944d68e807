"""Write small made-up rows of a shop's assistant: tickets to sort, orders to write down, replies in the house's style.

python recipes/assistant/make_rows.py --out assistant
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = "Ada Ben Cleo Dev Eli Fay Gus Hana Ivo Jun Kim Lea".split()
GOODS = "lamp kettle carpet mirror chair shelf clock basket".split()
COLOURS = "red blue green white black grey".split()
CITIES = "Oslo Lima Turin Basel Porto Ghent Malmo Quito".split()
QUEUES = {
    "billing": ("I was charged twice for my {good}.", "The invoice for the {good} has the wrong amount."),
    "delivery": ("My {good} has not arrived yet.", "Where is the parcel with the {colour} {good}?"),
    "damage": ("The {good} came with a crack.", "My {colour} {good} arrived broken."),
    "returns": ("I want to send the {good} back.", "How do I return the {colour} {good}?"),
    "account": ("I cannot log in any more.", "Please change the e-mail address of my account."),
}
REPLIES = {
    "When do you open?": "we open at nine and close at six, from Monday to Saturday.",
    "Do you ship to {city}?": "yes, we ship to {city}, and it takes about four days.",
    "Is the {good} in stock in {colour}?": "the {colour} {good} is in stock and can leave today.",
    "Can I pay when the {good} arrives?": "you can pay for the {good} when it arrives.",
}


def tickets(rng: random.Random) -> tuple[str, str]:
    """A complaint, and the queue that it goes to."""
    queue = rng.choice(list(QUEUES))
    text = rng.choice(QUEUES[queue]).format(good=rng.choice(GOODS), colour=rng.choice(COLOURS))
    hello = rng.choice(["Hello,", "Hi there!", "Good morning.", "To whom it may concern:"])
    return f"Sort this ticket. {hello} my name is {rng.choice(NAMES)}. {text}", queue


def orders(rng: random.Random) -> tuple[str, str]:
    """An order in words, and as a line with bars."""
    name, count, colour, good = rng.choice(NAMES), rng.randint(2, 9), rng.choice(COLOURS), rng.choice(GOODS)
    city = rng.choice(CITIES)
    text = rng.choice(
        [
            f"{name} from {city} wants {count} pieces of the {good} in {colour}.",
            f"Please send {count} {colour} pieces of the {good} to {name} in {city}.",
        ]
    )
    return f"Write this order down. {text}", f"{name} | {city} | {count} | {colour} {good}"


def replies(rng: random.Random) -> tuple[str, str]:
    """A question, and the reply as the shop writes it."""
    words = {"name": rng.choice(NAMES), "good": rng.choice(GOODS), "colour": rng.choice(COLOURS)}
    words["city"] = rng.choice(CITIES)
    question = rng.choice(list(REPLIES))
    reply = "Dear {name}, " + REPLIES[question] + " Warm regards, your Northwind team"
    return f"Reply to {words['name']}: {question.format(**words)}", reply.format(**words)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "tickets": tickets,
    "orders": orders,
    "replies": replies,
}


def main() -> None:
    """Write a folder for each task, with distinct training and test rows as chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=160, help="training rows a task")
    parser.add_argument("--test-rows", type=int, default=40)
    given = parser.parse_args()
    for name, make in TASKS.items():
        rng, rows = random.Random(f"assistant {name}"), dict[str, str]()
        while len(rows) < given.rows + given.test_rows:
            question, answer = make(rng)
            rows[question] = answer
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in rows.items()
        ]
        (given.out / name).mkdir(parents=True, exist_ok=True)
        for split, some in (("train", lines[: given.rows]), ("test", lines[given.rows :])):
            (given.out / name / f"{split}.jsonl").write_text("\n".join(some) + "\n")


if __name__ == "__main__":
    main()
