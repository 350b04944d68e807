"""Many rows lie on disk: the same tasks, digests, rows and runs as of rows in memory, and nothing is done twice."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, load_dataset
from pyarrow import parquet
from safetensors.torch import load_file

from pm_llm import ContinualSequence, PmLlmError, RunConfig, load_tasks
from pm_llm.config import load_config
from pm_llm.families.rows import TableRows
from pm_llm.run.going_on import _fingerprint
from pm_llm.system.files import sha256_of, sha256_of_list
from pm_llm.tasks import columns, fitting, store
from pm_llm.tasks.fitting import encoded, encoders_for
from pm_llm.tasks.store import Stored
from tests.helpers.presets import KEYS

ROWS = [{"id": f"{i}", "prompt": f"is {i} even ?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(40)]


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """Rows beyond eight lie on disk, in a folder of their own."""
    monkeypatch.setattr(store, "LIMIT", 8)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def jsonl(path: Path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(data, **keys):
    more = {key: keys.pop(key) for key in ("bad_rows", "max_train_samples") if key in keys}
    (task,) = load_tasks(RunConfig(tasks=[{"data": data, **keys}], **more))
    return task


def test_rows_on_disk_are_those_in_memory(small: Path, monkeypatch) -> None:
    file = jsonl(small / "a.jsonl")
    task = loaded(file, validation_size=0.25)
    assert isinstance(task.train, Stored)
    some = task.subset(5, None, 3)
    monkeypatch.setattr(store, "LIMIT", 1000)
    alike = loaded(jsonl(small / "b.jsonl"), name="a", validation_size=0.25)
    assert isinstance(alike.train, list)
    for split in ("train", "test", "validation"):
        ours, theirs = ([(r.body, r.completion, r.id) for r in getattr(one, split)] for one in (task, alike))
        assert ours == theirs
        assert _fingerprint(getattr(task, split), "x") == _fingerprint(getattr(alike, split), "x")
    assert [row.body for row in some.train] == [row.body for row in alike.subset(5, None, 3).train]
    assert [row.body for row in task.train[2:4]] == [task.train[2].body, task.train[3].body]


def test_digests_are_those_of_whole_lists() -> None:
    for values in ([], [[1, "é"]], [{"b": 1, "a": None}, [2]]):
        assert sha256_of_list(iter(values), "x", ["y"]) == sha256_of([values, "x", ["y"]])


def test_a_second_start_reads_looks_at_and_encodes_nothing(small: Path, monkeypatch) -> None:
    file = jsonl(small / "a.jsonl")
    config = RunConfig(tasks=[file])
    task = loaded(file)
    encoders, _ = encoders_for(config, [task])
    rows = encoded(encoders["a"], task.train, "a")
    digest = _fingerprint(task.train)
    assert isinstance(rows, TableRows)
    assert [dict(row) for row in rows] == encoders["a"].features(list(task.train))

    def never(*_, **__):
        raise AssertionError("it was done again")

    with monkeypatch.context() as patch:
        patch.setattr(columns.Columns, "example", never)
        patch.setattr(fitting, "_look", never)
        patch.setattr("pm_llm.tasks.encoding.Encoder.features", never)
        patch.setattr("pm_llm.run.going_on._plain", never)
        again = loaded(file)
        encoders, _ = encoders_for(config, [again])
        assert len(encoded(encoders["a"], again.train, "a")) == len(rows)
        assert _fingerprint(again.train) == digest
        assert again.files == task.files
    jsonl(small / "a.jsonl", [*ROWS, {"id": "40", "prompt": "is 40 even ?", "completion": "yes"}])
    assert len(loaded(file).train) + len(loaded(file).test) == 41


def test_a_cache_that_was_emptied_in_part_is_made_anew(small: Path) -> None:
    file = jsonl(small / "a.jsonl")
    before = loaded(file)
    for found in (small / "cache/pm_llm").glob("*.npy"):
        found.unlink()
    assert [row.body for row in loaded(file).train] == [row.body for row in before.train]


def test_what_is_wrong_is_told_by_file_and_line_and_dropped_rows_every_time(small: Path, capsys) -> None:
    rows = [*ROWS[:20], {**ROWS[20], "completion": ""}, {**ROWS[21], "id": "3"}, *ROWS[22:]]
    file = jsonl(small / "a.jsonl", rows)
    for _ in range(2):
        with pytest.raises(PmLlmError) as error:
            loaded(file)
        assert f"{file}:21: its answer" in str(error.value)
        assert f"{file}:22: its id '3' is that of {file}:4 too" in str(error.value)
    for _ in range(2):
        task = loaded(file, bad_rows="drop")
        assert len(task.train) + len(task.test) == 38
        assert f"{file}: 2 bad rows left out" in capsys.readouterr().out


def test_rows_that_the_model_cannot_be_given_are_dropped_on_disk_too(small: Path) -> None:
    file = jsonl(small / "a.jsonl", [*ROWS[:30], {**ROWS[30], "prompt": "what is </s> ?"}, *ROWS[31:]])
    task = loaded({"data": file}["data"], special_tokens=None)
    task = task.__class__(**{**task.__dict__, "special_tokens": None})
    with pytest.raises(PmLlmError, match=rf"{file}:31: it holds the text of the special token"):
        encoders_for(RunConfig(), [task])
    _, fitting_ = encoders_for(RunConfig(bad_rows="drop"), [task])
    kept = fitting_(task)
    assert len(kept.train) + len(kept.test) == 39


@pytest.mark.parametrize("preset", ["pm_curvature", "replay"])
def test_a_run_from_disk_is_that_from_memory(preset: str, small: Path, pico_folders, monkeypatch) -> None:
    files = [jsonl(small / f"{name}.jsonl") for name in ("one", "two")]
    keys = {**KEYS, "model": pico_folders["llama"], "method": preset, "tasks": files, "max_test_samples": 2}
    results = []
    for limit in (8, 1000):
        monkeypatch.setattr(store, "LIMIT", limit)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(small / f"cache-{limit}"))
        run = ContinualSequence(load_config(None, {**keys, "output_dir": str(small / f"run-{limit}")}))
        assert isinstance(run.tasks[0].train, Stored) == (limit == 8)
        results.append(run.run())
    assert results[0]["matrix"] == results[1]["matrix"]
    one, other = (load_file(small / f"run-{n}/adapter/adapter_model.safetensors") for n in (8, 1000))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [json.loads((small / f"run-{n}/state.json").read_text())["rows"] for n in (8, 1000)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", ["text", "preference"])
def test_other_kinds_of_rows_from_disk(kind: str, small: Path, pico_folders, monkeypatch) -> None:
    rows = [{"text": f"{r['prompt']} {r['completion']}"} for r in ROWS]
    if kind == "preference":
        rows = [{"prompt": r["prompt"], "chosen": "yes", "rejected": "no"} for r in ROWS]
    files = [jsonl(small / f"{name}.jsonl", rows) for name in ("one", "two")]
    keys = {**KEYS, "model": pico_folders["llama"], "method": "pm_curvature", "tasks": files, "max_test_samples": 2}
    adapters = []
    for limit in (8, 1000):
        monkeypatch.setattr(store, "LIMIT", limit)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(small / f"cache-{limit}"))
        ContinualSequence(load_config(None, {**keys, "output_dir": str(small / f"run-{limit}")})).run()
        adapters.append(load_file(small / f"run-{limit}/adapter/adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def zst(path: Path) -> str:
    with pa.output_stream(str(path), compression="zstd") as out:
        out.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    return str(path)


def test_compressed_files_are_read_line_by_line(small: Path) -> None:
    (small / "b.jsonl.gz").write_bytes(gzip.compress(Path(jsonl(small / "a.jsonl")).read_bytes()))
    for file in (str(small / "b.jsonl.gz"), zst(small / "c.jsonl.zst")):
        task = loaded(file, test_size=0.25)
        assert task.name in "bc"
        assert {row.place.rpartition(":")[0] for row in task.train} == {file}
        assert (len(task.train), len(task.test)) == (30, 10)
    (small / "d.jsonl.zst").write_bytes(Path(zst(small / "c.jsonl.zst")).read_bytes()[:-9])
    with pytest.raises(PmLlmError, match=r"d.jsonl.zst.*is not a whole zstandard file"):
        loaded(str(small / "d.jsonl.zst"))


def test_parquet_with_nested_columns_has_no_more_than_its_rows_say(small: Path) -> None:
    """Arrow gives every struct all fields of all rows; what a row does not say stays unsaid."""
    calls = [{"name": "f", "arguments": {"x": "1"}}, {"name": "g", "arguments": {"y": "2"}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls * 10
    ]
    parquet.write_table(pa.Table.from_pylist(rows), small / "a.parquet")
    task = loaded(str(small / "a.parquet"))
    said = {json.dumps(row.turn["tool_calls"][0]["function"]["arguments"]) for row in task.train}
    assert said == {'{"x": "1"}', '{"y": "2"}'}
    assert all(row.place.startswith(f"{small}/a.parquet:row ") for row in task.train)


def test_several_files_are_one_split(small: Path) -> None:
    halves = [jsonl(small / f"part{i}.jsonl", ROWS[20 * i : 20 * i + 20]) for i in range(2)]
    task = loaded(halves, test_size=0.25)
    assert task.name == "part0"
    assert len(task.train) + len(task.test) == 40
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        (small / "even" / split).mkdir(parents=True)
        jsonl(small / "even" / split / "a.jsonl", rows[:5])
        jsonl(small / "even" / split / "b.jsonl", rows[5:])
    task = loaded(str(small / "even"))
    assert (task.name, len(task.train), len(task.test)) == ("even", 30, 10)
    jsonl(small / "even/train.jsonl")
    with pytest.raises(PmLlmError, match=r"the folder train and train\.jsonl are both that split"):
        loaded(str(small / "even"))


def test_a_dataset_on_the_hub_may_be_streamed(small: Path, monkeypatch) -> None:
    asked = []

    def load(name, subset, streaming=False):
        asked.append(streaming)
        return load_dataset("json", data_files={"train": jsonl(small / "x.jsonl")}, streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", load)
    task = loaded("org/even", stream=True)
    assert asked == [True]
    assert isinstance(task.train, Stored)
    plain = loaded("org/even")
    assert [row.body for row in plain.train] == [row.body for row in task.train]


def test_memory_does_not_grow_with_rows(small: Path, monkeypatch) -> None:
    """Of 8,000 rows read from a file no more is held at once than a small part."""
    import tracemalloc

    path = small / "many.jsonl"
    with path.open("w") as file:
        for i in range(8_000):
            file.write(json.dumps({"prompt": f"{i} " * 400, "completion": "yes"}) + "\n")
    monkeypatch.setattr(store, "LIMIT", 100)
    tracemalloc.start()
    task = loaded(str(path))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.train) == 7_200
    assert os.path.getsize(path) > 12e6
    assert most < 6e6


def test_rows_in_memory_that_are_a_dataset(small: Path) -> None:
    from pm_llm import Task

    task = Task.from_dataset("even", Dataset.from_list(ROWS), ROWS[:4])
    assert isinstance(task.train, Stored)
    assert task.train[3].body == "is 3 even ?"
