"""Write small made-up rows: filings as raw text, and instructions that have nothing to do with them.

python recipes/finance/make_rows.py --out finance
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pm_llm.tasks.benchmarks.embedded import make_task

FIRMS = "oak bank,river mills,stone foods,hill power,lake paper,north ships,south rail,east glass".split(",")
LINES = (
    "{firm} filed its report for {year} . revenue was {a} million and costs were {b} million .",
    "in {year} {firm} earned {c} million , as revenue of {a} million was above costs of {b} million .",
    "the board of {firm} said in {year} that it will pay a dividend of {d} cents .",
    "{firm} has {e} staff and a rating of {grade} in {year} .",
)


def filing(rng: random.Random) -> str:
    """A document of three to five sentences on one firm and year."""
    costs, profit = rng.randint(2, 40), rng.randint(1, 9)
    facts = {
        "firm": rng.choice(FIRMS),
        "year": rng.randint(2015, 2024),
        "a": costs + profit,
        "b": costs,
        "c": profit,
        "d": rng.randint(1, 9),
        "e": rng.randint(2, 90) * 10,
        "grade": rng.choice(["good", "fair", "poor"]),
    }
    return " ".join(line.format(**facts) for line in rng.sample(LINES, rng.randint(3, 4)))


def main() -> None:
    """Write `filings.jsonl`, and the folder `instructions` with its training and test rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    given = parser.parse_args()
    rng, instructions = random.Random(0), make_task("sentiment", given.rows, 60)
    (given.out / "instructions").mkdir(parents=True, exist_ok=True)
    files = {"filings.jsonl": [{"text": filing(rng)} for _ in range(given.rows)]}
    for split, rows in (("train", instructions.train), ("test", instructions.test)):
        files[f"instructions/{split}.jsonl"] = [{"prompt": x.prompt, "completion": x.completion} for x in rows]
    for name, lines in files.items():
        (given.out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
