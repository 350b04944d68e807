"""Benchmark tasks from their Hub datasets: `load_dataset` itself, on folders of the datasets' names and layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.hub import CLASSIFICATION, TRACE
from pm_llm.tasks.loading import load_tasks
from tests.conftest import SHARED


def put(root: Path, source, row: dict, classes: int, splits: tuple[str, ...]) -> None:
    """A dataset repository as on the Hub: Parquet files by configuration and split, named in the card's YAML."""
    place = root / source.id
    config = source.subset or "default"
    columns = {name: Sequence(Value("string")) if isinstance(v, list) else Value("string") for name, v in row.items()}
    columns[source.label] = ClassLabel(num_classes=classes) if source.words else Value("int8")
    rows = [{**row, source.label: i % classes} for i in range(2 * classes)]
    for split in splits:
        file = place / config / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=Features(columns)).to_parquet(str(file))
    card = place / "README.md"
    known = card.read_text().removeprefix("---\nconfigs:\n").removesuffix("---\n") if card.exists() else ""
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    card.write_text(f"---\nconfigs:\n{known}- config_name: {config}\n  data_files:\n{files}---\n")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A working folder with every dataset; `load_dataset` takes a folder of an id's name for the id."""
    for source in CLASSIFICATION.values():
        row = {column: f" {column} x" for column in source.columns}
        put(tmp_path, source, row, len(source.words), (*source.splits, "unsupervised"))
    put(tmp_path, TRACE["FOMC"], {"sentence": "Rates rise."}, 3, ("train", "test"))
    science = {"question": "Why?", "choices": ["a", "b"], "hint": "", "lecture": "L.", "solution": "S."}
    put(tmp_path, TRACE["ScienceQA"], science, 2, ("train", "test"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_all_fifteen_tasks(hub) -> None:
    tasks = load_tasks(RunConfig(benchmark="long_sequence", order="order6"))
    assert len(tasks) == 15
    for task in tasks:
        source = CLASSIFICATION[task.name]
        assert {row.completion for row in task.train} == set(source.words) == set(task.labels)
        assert len(task.test) == len(task.train) == 2 * len(source.words)
        assert all(column in task.train[0].body for column in source.columns)
        assert task.train[0].place == f"{source.id}/{source.splits[0]}:row 1"


@pytest.mark.shared
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_text_and_labels_are_laid_out_as_upstream(name: str, hub) -> None:
    """All that stands around the columns is as in the upstream file's rows, and the labels are its labels."""
    (category,) = (SHARED / "data/olora_subset/CL_Benchmark").glob(f"*/{name}")
    upstream = json.loads((category / "train.json").read_text())[:50]
    (task,) = load_tasks(RunConfig(benchmark="long_sequence", order=[name]))
    assert list(task.labels) == json.loads((category / "labels.json").read_text())
    pattern = re.escape(task.train[0].body)
    for column in CLASSIFICATION[name].columns:
        pattern = re.sub(rf"(\\ )*{column}\\ x", "(.*?)", pattern)
    fits = sum(re.fullmatch(pattern, row["sentence"], re.S) is not None for row in upstream) / len(upstream)
    if name == "agnews":  # the Hub's has no title of its own
        assert fits == 0
    else:  # yahoo's questions without a body are laid out in another way
        assert fits > (0.3 if name == "yahoo" else 0.99), pattern


def test_trace(hub) -> None:
    fomc, science = load_tasks(RunConfig(benchmark="trace", order="FOMC,ScienceQA"))
    assert fomc.train[1].prompt.endswith("Choose one from A, B and C.\nText:\nRates rise.\nStance:")
    assert [row.completion for row in fomc.train] == ["A", "B", "C"] * 2
    assert science.train[1].prompt.endswith("Question:\nWhy?\n\nChoices:\nA. a\nB. b\n\nAnswer:")
    assert science.train[1].completion == "B\nL.S."


def test_hidden_labels_and_missing_columns(hub, monkeypatch) -> None:
    file = hub / CLASSIFICATION["CB"].id / "cb" / "train-00000-of-00001.parquet"
    rows = Dataset.from_parquet(str(file))
    hidden = rows.cast_column("label", Value("int64")).map(lambda row: {"label": -1}, load_from_cache_file=False)
    hidden.to_parquet(str(file))
    validation = file.with_name("validation-00000-of-00001.parquet")
    rows.cast_column("label", Value("int64")).to_parquet(str(validation))
    with pytest.raises(
        PmLlmError, match=r"aps/super_glue/train:row 1: label is -1; it must be a class number below 3"
    ):
        load_tasks(RunConfig(benchmark="long_sequence", order=["CB"]))
    renamed = Dataset.from_parquet(str(validation)).rename_column("premise", "before")
    for place in (file, validation, file.with_name("unsupervised-00000-of-00001.parquet")):
        renamed.to_parquet(str(place))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache2")  # it goes by the folder's name alone
    with pytest.raises(PmLlmError, match=r"aps/super_glue has no column premise; it has before"):
        load_tasks(RunConfig(benchmark="long_sequence", order=["CB"]))


def test_a_dataset_that_cannot_be_had(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PmLlmError, match=r"fancyzhx/dbpedia_14.*give --data-dir"):
        load_tasks(RunConfig(benchmark="standard_cl"))
