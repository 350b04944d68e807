"""Standard CL (orders 1-3) of text classification, with O-LoRA's prompts; orders 4-6 are the long sequence's.

From a folder, the upstream layout is read: `<data_dir>/<CATEGORY>/<DATASET>/{train,dev,test,labels}.json` with rows
`{"label": str, "sentence": str}`. Upstream (O-LoRA, arXiv 2310.14152) uses its dev as test; here the files are taken
by their names. Without a folder, the rows come from the datasets' ids on the Hub (`hub_rows.py`).
"""

from __future__ import annotations

from pathlib import Path

from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.files import is_there, read_json, short, text_pairs
from pm_llm.tasks.hub import CLASSIFICATION, load_rows
from pm_llm.tasks.problems import Problems

CATEGORY = {
    **dict.fromkeys(("yelp", "amazon", "IMDB", "SST-2"), "SC"),
    **dict.fromkeys(("dbpedia", "yahoo", "agnews"), "TC"),
    **dict.fromkeys(("MNLI", "CB", "RTE"), "NLI"),
    **{name: name for name in ("QQP", "WiC", "COPA", "BoolQA", "MultiRC")},
}
TASKS = tuple(CATEGORY)
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
ADVICE = (
    "--data-dir must name the CL_Benchmark folder of a clone of the O-LoRA repository, with <CATEGORY>/<DATASET>/ "
    "train.json, test.json and labels.json; with --data-dir none the rows come from the Hub."
)


def load_task(name: str, data_dir: str | None, problems: Problems) -> Task:
    """One task, from `data_dir` or from the Hub."""
    if data_dir is None:
        source = CLASSIFICATION[name]
        labels = source.labels
        splits = {
            split: [example(name, labels, *row) for row in rows] for split, rows in load_rows(source, problems).items()
        }
    else:
        folder = Path(data_dir)
        folder = (folder / "CL_Benchmark" if (folder / "CL_Benchmark").is_dir() else folder) / CATEGORY[name] / name
        if not is_there(folder, ADVICE, problems, folder=True):
            return Task(name, [], [])
        found = read_json(folder / "labels.json", problems)
        if found is not None and not (found and isinstance(found, list) and all(isinstance(x, str) for x in found)):
            problems.add(str(folder / "labels.json"), f"is {short(found)}; it must be a list of label words.")
            return Task(name, [], [])
        labels = tuple(found or ())
        splits = {split: _read(folder / f"{split}.json", name, labels, problems) for split in ("train", "dev", "test")}
    return Task(name, splits["train"], splits["test"], "exact_match", labels, splits.get("dev", []))


def example(name: str, labels: tuple[str, ...], sentence: str, label: str, place: str) -> Example:
    """One row in its frame; COPA has neither instruction nor option line."""
    category = CATEGORY[name]
    head = f"Task:{category}\nDataset:{name}\n"
    if category in INSTRUCTIONS:
        head += f"{INSTRUCTIONS[category]}Option: {', '.join(labels)} \n"
    return Example(sentence, label, head, "\nAnswer:", place=place)


def _read(path: Path, name: str, labels: tuple[str, ...], problems: Problems) -> list[Example]:
    if not is_there(path, ADVICE, problems, optional=path.stem == "dev"):
        return []
    return [example(name, labels, *row) for row in text_pairs(path, ("sentence", "label"), problems)]
