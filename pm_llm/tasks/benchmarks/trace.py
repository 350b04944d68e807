"""TRACE (arXiv 2310.06762): eight tasks of different kinds and languages.

`<data_dir>/<task>/{train,eval,test}.json` with rows `{"prompt", "answer"}`. Without a folder, the classification tasks
that have a dataset of their own on the Hub come from there (`hub_rows.py`).
"""

from __future__ import annotations

from pathlib import Path

from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.files import is_there, text_pairs
from pm_llm.tasks.hub import TRACE, load_rows
from pm_llm.tasks.problems import Problems

SCORER = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rougeL",
    "Py150": "fuzzy_code",
    "ScienceQA": "first_character",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "sari",
}
LABELS = {"C-STANCE": ("A", "B", "C"), "FOMC": ("A", "B", "C")}
TASKS = tuple(SCORER)
ORDERS = {
    "default": list(TASKS),
    "alternate": "FOMC C-STANCE NumGLUE-cm NumGLUE-ds ScienceQA MeetingBank Py150 20Minuten".split(),
}

ADVICE = "--data-dir must hold <task>/train.json and test.json of TRACE's data."


def load_task(name: str, data_dir: str | None, problems: Problems) -> Task:
    """One task, from `data_dir` or from the Hub. Raises PmLlmError if it needs a folder and there is none."""
    if data_dir is None:
        if name not in TRACE:
            raise PmLlmError(
                f"task {name!r} of benchmark trace is read from a folder: give --data-dir (the unpacked TRACE data). "
                f"From the Hub come {', '.join(TRACE)}."
            )
        splits = {
            split: [_example(name, *row) for row in rows] for split, rows in load_rows(TRACE[name], problems).items()
        }
    else:
        folder = Path(data_dir) / name
        if not is_there(folder, ADVICE, problems, folder=True):
            return Task(name, [], [])
        files = {"train": "train", "dev": "eval", "test": "test"}
        splits = {split: _read(folder / f"{file}.json", name, problems) for split, file in files.items()}
    return Task(name, splits["train"], splits["test"], SCORER[name], LABELS.get(name, ()), splits.get("dev", []))


def _read(path: Path, name: str, problems: Problems) -> list[Example]:
    if not is_there(path, ADVICE, problems, optional=path.stem == "eval"):
        return []
    return [_example(name, *row) for row in text_pairs(path, ("prompt", "answer"), problems)]


def _example(name: str, prompt: str, answer: str, place: str) -> Example:
    return Example(prompt, answer, source=prompt if SCORER[name] == "sari" else None, place=place)
