"""Rows of classification tasks from their datasets on the Hub, in the layout of O-LoRA's and TRACE's files.

Datasets, configurations and columns are those of the datasets' cards. What differs from the upstream files: ag_news
gives title and description as one text; the upstream folders are samples of these datasets, with other rows; of a
split of more than LARGEST rows that many are drawn (seed 0). GLUE and SuperGLUE hide their test labels, so their
validation split is the test. C-STANCE has no dataset on the Hub that we know of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError, near_file
from pm_llm.tasks.problems import Problems

LARGEST = 20_000
_TEST = ("train", "test")
_VALIDATION = ("train", "validation")


@dataclass(frozen=True)
class HubRows:
    """Where a task's rows are, and how they become text and label.

    Args:
        id: The dataset.
        subset: Its configuration.
        columns: Columns that must be there.
        text: The row as text: a format string, or a function of the row.
        words: The label word of each class number.
        prompt_order: The label words in prompt order, if it is another than that of `words`.
        splits: The dataset's splits for training and test.
        label: The column of the class number.
        answer: The row's answer, where it is more than the label word.
    """

    id: str
    subset: str | None
    columns: tuple[str, ...]
    text: str | Callable[[dict[str, Any]], str]
    words: tuple[str, ...] = ()
    prompt_order: tuple[str, ...] = ()
    splits: tuple[str, str] = _TEST
    label: str = "label"
    answer: Callable[[dict[str, Any]], str] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words in prompt order."""
        return self.prompt_order or self.words


_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_BAD_GOOD, _GOOD_BAD = ("Bad", "Good"), ("Good", "Bad")
_FALSE_TRUE, _TRUE_FALSE = ("False", "True"), ("True", "False")
_PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}"
_LETTERS = "ABCDEFGHIJ"


def _dbpedia(row: dict[str, Any]) -> str:
    return f"Title: {row['title']}\nText:  {row['content'].lstrip()}\n"


def _yahoo(row: dict[str, Any]) -> str:
    if not row["question_content"]:
        return f"Question: {row['question_title']}\nAnswer: {row['best_answer']}\n"
    return f"Title: {row['question_title']}\nQuestion: {row['question_content']}\nAnswer: {row['best_answer']}\n"


def _copa(row: dict[str, Any]) -> str:
    return (
        f'Which sentence is the {row["question"]} of "{row["premise"]}"? Choose one between A and B.\n'
        f"A: {row['choice1']}\nB: {row['choice2']}"
    )


def _multirc(row: dict[str, Any]) -> str:
    return f"paragraph: {row['paragraph'].rstrip()} \nquestion: {row['question']}\ncandidate answer: {row['answer']}"


def _science(row: dict[str, Any]) -> str:
    hint = f"Hint:\n{row['hint']}\n\n" if row["hint"] else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, row["choices"], strict=False))
    return (
        "Choose an answer for the following question and give your reasons.\n\n"
        f"Question:\n{row['question']}\n\n{hint}Choices:\n{choices}\n\nAnswer:"
    )


def _science_answer(row: dict[str, Any]) -> str:
    return f"{_LETTERS[row['answer']]}\n{row['lecture']}{row['solution']}"


_GLUE, _SUPER = "nyu-mll/glue", "aps/super_glue"
CLASSIFICATION: dict[str, HubRows] = {
    "yelp": HubRows("Yelp/yelp_review_full", "yelp_review_full", ("text",), "Text: {text}\n", _STARS),
    "amazon": HubRows(
        "vgaraujov/amazon_review_full", None, ("title", "content"), "Title: {title}\nText: {content}\n", _STARS
    ),
    "IMDB": HubRows("stanfordnlp/imdb", "plain_text", ("text",), "{text}", _BAD_GOOD, _GOOD_BAD),
    "SST-2": HubRows(
        _GLUE, "sst2", ("sentence",), lambda r: f"Text: {r['sentence'].rstrip()} ", _BAD_GOOD, _GOOD_BAD, _VALIDATION
    ),
    "dbpedia": HubRows(
        "fancyzhx/dbpedia_14",
        "dbpedia_14",
        ("title", "content"),
        _dbpedia,
        tuple(
            "Company,Educational Institution,Artist,Athlete,Office Holder,Mean of Transportation,Building,"
            "Natural Place,Village,Animal,Plant,Album,Film,Written Work".split(",")
        ),
    ),
    "yahoo": HubRows(
        "community-datasets/yahoo_answers_topics",
        "yahoo_answers_topics",
        ("question_title", "question_content", "best_answer"),
        _yahoo,
        tuple(
            "Society & Culture,Science & Mathematics,Health,Education & Reference,Computers & Internet,Sports,"
            "Business & Finance,Entertainment & Music,Family & Relationships,Politics & Government".split(",")
        ),
        label="topic",
    ),
    "agnews": HubRows(
        "fancyzhx/ag_news",
        "default",
        ("text",),
        "Text: {text}\n",
        ("World", "Sports", "Business", "Science or Technology"),
    ),
    "MNLI": HubRows(
        _GLUE,
        "mnli",
        ("premise", "hypothesis"),
        _PAIR,
        ("entailment", "neutral", "contradiction"),
        ("neutral", "entailment", "contradiction"),
        ("train", "validation_matched"),
    ),
    "CB": HubRows(
        _SUPER,
        "cb",
        ("premise", "hypothesis"),
        _PAIR,
        ("entailment", "contradiction", "neutral"),
        splits=_VALIDATION,
    ),
    "RTE": HubRows(
        _GLUE,
        "rte",
        ("sentence1", "sentence2"),
        "sentence 1: {sentence1}\nsentence 2: {sentence2}",
        ("entailment", "contradiction"),
        ("contradiction", "entailment"),
        _VALIDATION,
    ),
    "QQP": HubRows(
        _GLUE,
        "qqp",
        ("question1", "question2"),
        "first sentence: {question1}\nsecond sentence: {question2}",
        _FALSE_TRUE,
        splits=_VALIDATION,
    ),
    "WiC": HubRows(
        _SUPER,
        "wic",
        ("word", "sentence1", "sentence2"),
        "word: {word}\n{sentence1}\n{sentence2}",
        _FALSE_TRUE,
        _TRUE_FALSE,
        _VALIDATION,
    ),
    "COPA": HubRows(
        _SUPER, "copa", ("premise", "choice1", "choice2", "question"), _copa, ("A", "B"), splits=_VALIDATION
    ),
    "BoolQA": HubRows(
        _SUPER,
        "boolq",
        ("question", "passage"),
        "question: {question}\npassage: {passage}",
        _FALSE_TRUE,
        _TRUE_FALSE,
        _VALIDATION,
    ),
    "MultiRC": HubRows(
        _SUPER, "multirc", ("paragraph", "question", "answer"), _multirc, _FALSE_TRUE, splits=_VALIDATION
    ),
}
TRACE: dict[str, HubRows] = {
    "FOMC": HubRows(
        "gtfintechlab/fomc_communication",
        None,
        ("sentence",),
        "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. Choose one "
        "from A, B and C.\nText:\n{sentence}\nStance:",
        ("A", "B", "C"),
    ),
    "ScienceQA": HubRows(
        "tasksource/ScienceQA_text_only",
        None,
        ("question", "choices", "hint", "lecture", "solution"),
        _science,
        label="answer",
        answer=_science_answer,
    ),
}


def load_rows(source: HubRows, problems: Problems) -> dict[str, list[tuple[str, str, str]]]:
    """(text, answer, place) of the rows of the splits `train` and `test`.

    Raises:
        PmLlmError: If the dataset cannot be had, or lacks a split or a column.
    """
    try:
        loaded = load_hub_dataset(source.id, source.subset)
    except PmLlmError as error:
        raise PmLlmError(f"{error} To read the benchmark's upstream files from a folder, give --data-dir.") from error
    found: dict[str, list[tuple[str, str, str]]] = {}
    for split, name in zip(("train", "test"), source.splits, strict=True):
        if name not in loaded:
            raise PmLlmError(f"dataset {source.id} has no split {name!r}; it has {', '.join(loaded)}.")
        rows = loaded[name]
        missing = [column for column in (*source.columns, source.label) if column not in rows.column_names]
        if missing:
            raise PmLlmError(
                f"dataset {source.id} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}."
            )
        if len(rows) > LARGEST:
            rows = rows.shuffle(seed=0).select(range(LARGEST))
        found[split] = [
            row
            for number, values in enumerate(rows, start=1)
            if (row := _row(source, values, f"{source.id}/{name}:row {number}", problems)) is not None
        ]
    return found


def _row(source: HubRows, values: dict[str, Any], place: str, problems: Problems) -> tuple[str, str, str] | None:
    number = values[source.label]
    if not isinstance(number, int) or number < 0 or (source.words and number >= len(source.words)):
        problems.row(place, f"{source.label} is {number!r}; it must be a class number below {len(source.words)}.")
        return None
    text = source.text.format(**values) if isinstance(source.text, str) else source.text(values)
    answer = source.answer(values) if source.answer else source.words[number]
    return text, answer, place


def load_hub_dataset(name: str, subset: str | None, stream: bool = False) -> dict[str, Any]:
    """All splits of a dataset by its id, loaded or as streams. Raises PmLlmError if it cannot be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:  # it would read all such files below the working folder
        raise PmLlmError(f"{name!r} is a file format to `datasets`, not a dataset. Give a file, a folder or an id.")
    try:
        return dict(load_dataset(name, subset, streaming=stream))
    except (
        DatasetNotFoundError,
        DatasetGenerationError,
        ConnectionError,
        FileNotFoundError,
        ValueError,
        RuntimeError,
    ) as error:
        raise PmLlmError(
            f"{name!r} is neither a file here nor a dataset to be had: {error.__cause__ or error}."
            f"{near_file(Path(name))}"
        ) from error
