"""Standard CL (orders 1-3) and the long sequence (orders 4-6) of 15 classification tasks, in O-LoRA's layout.

`<data_dir>/<CATEGORY>/<DATASET>/{train,dev,test,labels}.json`; rows are `{"label": str, "sentence": str}`. Upstream
(O-LoRA, arXiv 2310.14152) uses its dev as test; here the files are taken by their names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.tasks import Example, Task, pick_order

CATEGORY = {
    **dict.fromkeys(("yelp", "amazon", "IMDB", "SST-2"), "SC"),
    **dict.fromkeys(("dbpedia", "yahoo", "agnews"), "TC"),
    **dict.fromkeys(("MNLI", "CB", "RTE"), "NLI"),
    **{name: name for name in ("QQP", "WiC", "COPA", "BoolQA", "MultiRC")},
}
ORDERS = {
    "order1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "order2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "order3": ["yahoo", "amazon", "agnews", "dbpedia"],
    "order4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo".split(),
    "order5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo".split(),
    "order6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC".split(),
}
_CHOOSE = "Choose one from the option.\n"
INSTRUCTIONS = {
    "SC": "What is the sentiment of the following paragraph? " + _CHOOSE,
    "TC": "What is the topic of the following paragraph? " + _CHOOSE,
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? ' + _CHOOSE,
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? ' + _CHOOSE,
    "BoolQA": "According to the following passage, is the question true or false? " + _CHOOSE,
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? " + _CHOOSE,
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? " + _CHOOSE,
}


def load(order: str | Sequence[str] | None, data_dir: str | None) -> list[Task]:
    """The tasks of an order (`order1` ... `order6`, or a list of dataset names) from `data_dir`."""
    names = pick_order(order, ORDERS, list(CATEGORY))
    if data_dir is None:
        raise PmLlmError(
            "benchmark standard_cl reads its rows from a folder: give --data-dir "
            "(the CL_Benchmark folder of a clone of the O-LoRA repository)."
        )
    folder = Path(data_dir)
    if (folder / "CL_Benchmark").is_dir():
        folder = folder / "CL_Benchmark"
    return [_load_task(folder, name) for name in names]


def _load_task(folder: Path, name: str) -> Task:
    category = CATEGORY[name]
    place = folder / category / name
    labels = tuple(str(label) for label in _read(place / "labels.json"))
    # COPA has neither instruction nor option line
    framed = category in INSTRUCTIONS
    head = f"Task:{category}\nDataset:{name}\n"
    head += f"{INSTRUCTIONS[category]}Option: {', '.join(labels)} \n" if framed else ""

    def rows(split: str) -> list[Example]:
        return [
            Example(str(row["sentence"]), str(row["label"]), head, "\nAnswer:")
            for row in _read(place / f"{split}.json")
        ]

    return Task(name, rows("train"), rows("test"), "exact_match", labels)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PmLlmError(
            f"{path} is missing. --data-dir must hold <CATEGORY>/<DATASET>/train.json, test.json, labels.json."
        ) from None
    except json.JSONDecodeError as error:
        raise PmLlmError(f"{path} is not valid JSON: {error}.") from error
