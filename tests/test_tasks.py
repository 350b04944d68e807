"""Tasks: the benchmark's prompts, and the user's files, folders, saved datasets and dataset ids."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict

from pm_llm import ContinualSequence
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Example, Task, checked
from pm_llm.tasks.benchmarks.embedded import MAKERS, make_task
from pm_llm.tasks.hub import load_hub_dataset
from pm_llm.tasks.loading import load_probes, load_tasks
from tests.conftest import SHARED
from tests.helpers.tasks import user_tasks, write


def test_standard_cl_prompt(tmp_path) -> None:
    write(tmp_path, "TC", "agnews", ["World", "Sports"], [{"label": "Sports", "sentence": "A goal.\n"}])
    write(tmp_path, "COPA", "COPA", ["A", "B"], [{"label": "B", "sentence": "Which?\nA: x\nB: y"}])
    config = RunConfig(benchmark="standard_cl", order=["agnews", "COPA"], data_dir=str(tmp_path))
    agnews, copa = load_tasks(config)
    assert agnews.train[0].prompt == (
        "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nA goal.\n\nAnswer:"
    )
    assert agnews.train[0].completion == "Sports"
    assert agnews.labels == ("World", "Sports")
    assert copa.train[0].prompt == "Task:COPA\nDataset:COPA\nWhich?\nA: x\nB: y\nAnswer:"


def test_standard_cl_names_what_is_missing(tmp_path) -> None:
    config = RunConfig(benchmark="standard_cl", order=["agnews"], data_dir=str(tmp_path))
    with pytest.raises(PmLlmError, match=r"TC/agnews: is missing.*--data-dir"):
        load_tasks(config)


@pytest.mark.shared
@pytest.mark.parametrize("order", ["order1", "order2", "order3", "order4", "order5", "order6"])
def test_standard_cl_on_real_rows(order: str) -> None:
    upstream = json.loads((SHARED / "data/orders.json").read_text())
    data_dir = str(SHARED / "data/olora_subset")  # the folder above CL_Benchmark is understood too
    config = RunConfig(benchmark="standard_cl", order=order, data_dir=data_dir, max_train_samples=5)
    tasks = load_tasks(config)
    assert [t.name for t in tasks] == {**upstream["standard_cl"], **upstream["long_sequence"]}[order]
    for task in tasks:
        assert len(task.train) == 5
        assert len(task.test) > 20
        assert {row.completion for row in task.test} <= set(task.labels)
        assert all(row.prompt.endswith("\nAnswer:") for row in task.train)


@pytest.mark.parametrize("name", MAKERS)
def test_embedded_rows_are_distinct_and_always_the_same(name: str) -> None:
    task = make_task(name)
    assert not {row.body for row in task.train} & {row.body for row in task.test}
    assert {row.completion for row in task.test} <= {row.completion for row in task.train}
    assert task == make_task(name)


# ---- the user's own ----
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(kind: str, tmp_path) -> None:
    path = tmp_path / f"support.{kind}"
    rows = Dataset.from_list(ROWS)
    {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind](str(path))
    (task,) = user_tasks(str(path))
    assert task.name == "support"
    assert (len(task.train), len(task.test)) == (18, 2)  # a tenth is split off
    together = {(row.prompt, row.completion) for row in [*task.train, *task.test]}
    assert together == {(row["prompt"], row["completion"]) for row in ROWS}


def test_folder_columns_splits_and_names(tmp_path) -> None:
    folder = tmp_path / "legal"
    folder.mkdir()
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    Dataset.from_list(renamed[:15]).to_json(str(folder / "train.jsonl"))
    Dataset.from_list(renamed[15:]).to_json(str(folder / "held_out.jsonl"))
    entry = {"data": "legal", "prompt": "q", "completion": "a", "test_split": "held_out", "name": "law"}
    (task,) = user_tasks(entry, data_dir=str(tmp_path))
    assert (task.name, len(task.train), len(task.test)) == ("law", 15, 5)
    with pytest.raises(PmLlmError, match="no split 'training'; it has held_out, train"):
        user_tasks({**entry, "train_split": "training"}, data_dir=str(tmp_path))
    with pytest.raises(PmLlmError, match=r"'promt'.*Did you mean 'prompt'"):
        user_tasks({"data": "legal", "promt": "q"})


def test_a_folder_of_tasks(tmp_path) -> None:
    folder = tmp_path / "mine"
    (folder / "b").mkdir(parents=True)
    for place in (folder / "c.jsonl", folder / "a.csv", folder / "b" / "train.jsonl"):
        rows = Dataset.from_list(ROWS)
        (rows.to_csv if place.suffix == ".csv" else rows.to_json)(str(place))
    for entry, options in ((str(folder), {}), ("mine", {"data_dir": str(tmp_path)})):
        assert [task.name for task in user_tasks(entry, **options)] == ["a", "b", "c"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PmLlmError, match=r"holds no \.jsonl"):
        user_tasks(str(tmp_path / "nothing"))


def test_saved_dataset(tmp_path) -> None:
    DatasetDict(train=Dataset.from_list(ROWS[:12]), validation=Dataset.from_list(ROWS[12:])).save_to_disk(
        str(tmp_path / "saved")
    )
    (task,) = user_tasks(str(tmp_path / "saved"))
    assert (len(task.train), len(task.test)) == (12, 8)  # validation stands in for test


def test_the_hub_code_path_on_a_local_repository(tmp_path) -> None:
    """`load_dataset` itself, as for an id on the Hub, given a folder laid out like a dataset repository."""
    for split, rows in (("train", ROWS[:12]), ("test", ROWS[12:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(tmp_path / "data" / f"{split}-00000.parquet"))
    splits = load_hub_dataset(str(tmp_path), None)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "test": 8}


def test_a_file_and_its_test_file(tmp_path) -> None:
    for name, rows in (("a", ROWS[:12]), ("b", ROWS[12:])):
        Dataset.from_list(rows).to_json(str(tmp_path / f"{name}.jsonl"))
    (task,) = user_tasks({"data": str(tmp_path / "a.jsonl"), "test_data": str(tmp_path / "b.jsonl")})
    assert (len(task.train), len(task.test)) == (12, 8)


def test_what_is_neither_file_nor_dataset(tmp_path, monkeypatch) -> None:
    with pytest.raises(PmLlmError, match="does not exist"):
        user_tasks(str(tmp_path / "none.jsonl"))
    with pytest.raises(PmLlmError, match="neither a file here nor a dataset to be had"):
        user_tasks("org/no-such-dataset")
    (tmp_path / "a.txt").write_text("x")
    Dataset.from_list(ROWS).to_json(str(tmp_path / "a.jsonl"))
    Dataset.from_list(ROWS).to_json(str(tmp_path / "legal" / "train.jsonl"))
    with pytest.raises(PmLlmError, match=r"does not exist. Did you mean 'a.jsonl'\?"):
        user_tasks(str(tmp_path / "aa.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PmLlmError, match=r"a dataset to be had: .* Did you mean 'legal'\?"):
        user_tasks("legla")
    with pytest.raises(PmLlmError, match=r"files of kind '\.txt'"):
        user_tasks(str(tmp_path / "a.txt"))
    with pytest.raises(PmLlmError, match="two tasks have one name"):
        user_tasks(str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"))
    with pytest.raises(PmLlmError, match="give `benchmark`"):
        load_tasks(RunConfig())


def test_labels_that_pandas_takes_for_missing(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "x,None\ny,NA\n" * 6)
    (task,) = user_tasks(str(tmp_path / "a.csv"))
    assert {row.completion for row in task.train} == {"None", "NA"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"data": 5}, "data is 5"),
        ({"data": "a.jsonl", "test_size": "some"}, "test_size is 'some'; it must be a finite number"),
        ({"data": "a.jsonl", "scorer": "rougel"}, r"unknown scorer of task 'a': 'rougel'.*Did you mean 'rougeL'"),
    ],
)
def test_entries_that_cannot_be(entry: dict, expected: str, tmp_path) -> None:
    Dataset.from_list(ROWS).to_json(str(tmp_path / "a.jsonl"))
    with pytest.raises(PmLlmError, match=expected):
        user_tasks(entry, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "messages", [None, "x", [{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": "x"}]]
)
def test_chats_that_cannot_be(messages, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 12)
    with pytest.raises(
        PmLlmError,
        match=r"role is 1|must be a list of turns|needs `role` and `content`|must end with an assistant turn",
    ):
        user_tasks(str(tmp_path / "a.jsonl"))


def test_a_folder_of_shards_is_one_task(tmp_path) -> None:
    """The layout of a dataset repository's `data`; its test rows are not trained."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, number, rows in (("train", 0, ROWS[:4]), ("train", 1, ROWS[4:6]), ("test", 0, ROWS[6:9])):
        many = 2 if split == "train" else 1
        Dataset.from_list(rows).to_parquet(str(folder / f"{split}-{number:05}-of-{many:05}.parquet"))
    (task,) = user_tasks(str(folder))
    assert [row.prompt for row in task.train] == [row["prompt"] for row in ROWS[:6]]
    assert [row.prompt for row in task.test] == [row["prompt"] for row in ROWS[6:9]]
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(PmLlmError, match="1 of the 2 files"):
        user_tasks(str(folder))
    old = tmp_path / "old"  # as datasets named them before
    old.mkdir()
    for split in ("train", "test"):
        Dataset.from_list(ROWS).to_parquet(str(old / f"{split}-00000-of-00001-a09b74b3ef9c3b56.parquet"))
    for name in ("notes.csv", "notes.json", "unsupervised-00000-of-00002.jsonl"):  # of no split that is read
        (old / name).write_text("nothing")
    (task,) = user_tasks(str(old))
    assert (task.name, len(task.train), len(task.test)) == ("old", len(ROWS), len(ROWS))
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / "two").mkdir(exist_ok=True)
        Dataset.from_list(ROWS).to_json(str(tmp_path / "two" / name))
    with pytest.raises(PmLlmError, match=r"train\.csv and train\.jsonl"):
        user_tasks(str(tmp_path / "two"))


def test_subfolders_are_no_splits(tmp_path) -> None:
    for name in ("dev", "test"):
        (tmp_path / "many" / name).mkdir(parents=True)
        Dataset.from_list(ROWS).to_json(str(tmp_path / "many" / name / "train.jsonl"))
    Dataset.from_list(ROWS).to_json(str(tmp_path / "many/eval.jsonl"))
    assert [task.name for task in user_tasks(str(tmp_path / "many"))] == ["dev", "eval", "test"]
    (tmp_path / "many/train").mkdir()  # of one task, in a layout that is not known
    with pytest.raises(PmLlmError, match="has no split 'train'"):
        user_tasks(str(tmp_path / "many"))


def test_a_folder_of_test_rows_alone(tmp_path) -> None:
    """Enough for a probe, and no task called test."""
    for name in ("facts", "more"):
        (tmp_path / name).mkdir()
        Dataset.from_list(ROWS[:5]).to_json(str(tmp_path / name / "test.jsonl"))
    DatasetDict(validation=Dataset.from_list(ROWS[:3])).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(PmLlmError, match="'facts' has no split 'train'; it has test"):
        user_tasks(str(tmp_path / "facts"))
    entries = [str(tmp_path / "facts"), {"data": str(tmp_path / "more"), "name": "mine"}, str(tmp_path / "saved")]
    probes = load_probes(RunConfig(probes=entries))
    assert [(probe.name, len(probe.test)) for probe in probes] == [("facts", 5), ("mine", 5), ("saved", 3)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("test_size", 7, "test_size is 7"),
        ("test_size", 0, "test_size is 0"),
        ("validation_size", 1, "validation_size is 1"),
        ("subset", "en", "subset 'en' is of a dataset on the Hub"),
    ],
)
def test_keys_that_would_do_nothing(key: str, value, said: str, tmp_path) -> None:
    for split in ("train", "test"):
        Dataset.from_list(ROWS).to_json(str(tmp_path / f"{split}.jsonl"))
    with pytest.raises(PmLlmError, match=said):
        user_tasks({"data": str(tmp_path), key: value})


def test_a_dataset_of_the_hub_as_a_probe_keeps_its_test_split(monkeypatch) -> None:
    splits = {name: Dataset.from_list(ROWS[:n]) for name, n in (("train", 4), ("test", 2))}
    monkeypatch.setattr("pm_llm.tasks.user.load_hub_dataset", lambda *_: splits)
    (task,) = load_probes(RunConfig(probes=["org/facts"]))
    assert (len(task.train), len(task.test)) == (4, 2)


def test_rows_given_for_validation_stay_validation_rows(tmp_path) -> None:
    Dataset.from_list(ROWS * 2).to_json(str(tmp_path / "a.jsonl"))
    Dataset.from_list(ROWS[:3]).to_json(str(tmp_path / "v.jsonl"))
    (task,) = user_tasks({"data": str(tmp_path / "a.jsonl"), "validation_data": str(tmp_path / "v.jsonl")})
    assert len(task.validation) == 3
    assert len(task.test) == round(0.1 * 2 * len(ROWS))
    for split, n in (("train", 4), ("dev", 2)):
        Dataset.from_list(ROWS[:n]).to_json(str(tmp_path / "b" / f"{split}.jsonl"))
    (task,) = user_tasks({"data": str(tmp_path / "b"), "validation_data": str(tmp_path / "v.jsonl")})
    assert (len(task.train), len(task.test), len(task.validation)) == (4, 2, 3)


def test_rows_that_are_trained_on_do_not_stand_in_for_a_test(tmp_path) -> None:
    rows = Dataset.from_list([{**row, "prompt": f"{i}"} for i, row in enumerate(ROWS * 4)])
    rows.to_json(str(tmp_path / "dev.jsonl"))
    (task,) = user_tasks({"data": str(tmp_path), "train_split": "dev"})
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.test}
    (probe,) = load_probes(RunConfig(probes=[{"data": str(tmp_path), "train_split": "dev"}]))
    assert len(probe.test) == 4 * len(ROWS)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("data", ["", "train.jsonl"])
def test_rows_that_are_trained_on_are_not_scored(split: str, data: str, tmp_path) -> None:
    """A dataset on the Hub that has one split, called test, is trained on with `train_split: test`."""
    rows = Dataset.from_list([{**row, "prompt": f"{i}"} for i, row in enumerate(ROWS * 4)])
    for name in (split, "train"):
        rows.to_json(str(tmp_path / f"{name}.jsonl"))
    (task,) = user_tasks({"data": str(tmp_path / data), "train_split": split, "validation_size": 0.2})
    shares = [{row.prompt for row in rows} for rows in (task.train, task.test, task.validation)]
    assert [len(share) for share in shares] == [57, 8, 15]
    assert len(set.union(*shares)) == 80
    for wrong in ({"test_split": "train"}, {"validation_split": "train"}):
        with pytest.raises(PmLlmError, match="and train_split are both 'train'"):
            user_tasks({"data": str(tmp_path), **wrong})
    with pytest.raises(PmLlmError, match="test_split and train_split are both 'test'"):
        user_tasks({"data": str(tmp_path / "train.jsonl"), "train_split": "test", "test_data": str(tmp_path)})


def test_rows_that_are_the_test_are_not_the_validation(tmp_path) -> None:
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(ROWS * 4)]
    for split, some in (("train", rows[6:]), ("validation", rows[:4]), ("test", rows[4:6])):
        Dataset.from_list(some).to_json(str(tmp_path / "a" / f"{split}.jsonl"))
    entry = {"data": str(tmp_path / "a"), "test_split": "validation"}
    (task,) = user_tasks(entry)
    assert (len(task.train), len(task.test), len(task.validation)) == (len(rows) - 6, 4, 0)
    (task,) = user_tasks({**entry, "validation_size": 0.5})
    assert len(task.test) == 4
    assert len(task.validation) == len(task.train) == (len(rows) - 6) / 2


def test_rows_of_two_uses_are_not_asked_for_under_one_name(tmp_path) -> None:
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(ROWS * 4)]
    for split, some in (("train", rows[6:]), ("validation", rows[:4])):
        Dataset.from_list(some).to_json(str(tmp_path / "a" / f"{split}.jsonl"))
    file = str(tmp_path / "v.jsonl")
    Dataset.from_list(rows[4:6]).to_json(file)
    for more, said in (
        ({"validation_data": file, "test_split": "validation"}, "test_split and validation_split are both"),
        ({"test_data": file, "test_split": "x", "validation_split": "x"}, "test_split and validation_split are both"),
        ({"test_data": file, "validation_data": file}, "test_data and validation_data are both"),
    ):
        with pytest.raises(PmLlmError, match=said):
            user_tasks({"data": str(tmp_path / "a"), **more})


def test_two_tasks_of_one_name(pico_folders, tmp_path) -> None:
    """A task may recur, but only as itself."""
    config = RunConfig(model=pico_folders["llama"], output_dir=str(tmp_path / "run"))
    one = Task("same", [Example("a", "x")], [Example("b", "x")])
    assert list(ContinualSequence(config, [one, replace(one)]).columns) == ["same"]
    from_elsewhere = replace(one, train=[Example("a", "x", id="1", place="b.jsonl:1")])
    assert list(ContinualSequence(config, [one, from_elsewhere]).columns) == ["same"]
    for other in (replace(one, test=[Example("c", "x")]), replace(one, train=[Example("d", "a longer answer")])):
        with pytest.raises(PmLlmError, match="have one name: same"):
            ContinualSequence(config, [one, other])


def test_labels_that_exact_match_cannot_tell_apart() -> None:
    rows = [Example("x", "+"), Example("y", "-")]
    assert checked([Task("a", rows, rows, labels=("+", "-"))])
    twice = ("3.5", "35")
    rows = [Example("x", label) for label in twice]
    with pytest.raises(PmLlmError, match=r"takes the labels '3.5' and '35' for one.* Use scorer accuracy"):
        checked([Task("a", rows, rows, labels=twice)])
    assert checked([Task("a", rows, rows, "accuracy", labels=twice)])
