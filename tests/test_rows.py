"""Rows and what is wrong with them: file and line, all at once, and nothing trained."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pm_llm.cli import main
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.files import read_rows
from pm_llm.tasks.loading import load_probes, load_tasks
from pm_llm.tasks.problems import Problems

GOOD = {"id": 1, "prompt": "is it good ?", "completion": "yes"}
BAD = {  # line -> (row as bytes, what is said of it)
    2: (json.dumps({"id": 2, "prompt": "x"}), "column 'completion' is missing"),
    3: (json.dumps({**GOOD, "id": 3, "prompt": ["x"]}), "prompt is ['x'] (list); it must be text"),
    4: (json.dumps({**GOOD, "id": 4, "completion": 5}), "completion is 5 (int); it must be text"),
    5: (json.dumps({**GOOD, "id": 5, "completion": " "}), "answer (completion or label) is empty"),
    6: (json.dumps({**GOOD, "id": 6, "prompt": "bytes"}).encode().replace(b"bytes", b"by\xfftes"), "not valid UTF-8"),
    7: (json.dumps(GOOD), "its id '1' is that of {path}:1 too"),
    8: (json.dumps({**GOOD, "id": 8, "prompt": "x" * 2_000_000}), "2,000,000 characters; at most 1,000,000"),
    9: (json.dumps({**GOOD, "id": 9, "completion": "maybe"}), "label 'maybe' is none of the task's: yes, no"),
    10: ("{not json", "is not valid JSON"),
    11: ('["a", "list"]', "a row must be an object"),
    12: (json.dumps({**GOOD, "id": 12, "completion": None}), "completion is None (NoneType)"),
    13: (json.dumps({**GOOD, "id": 13, "prompt": " "}), "its prompt is empty"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A task with every kind of bad row among good ones, and an empty test split."""
    lines = [json.dumps(GOOD).encode(), *(row if isinstance(row, bytes) else row.encode() for row, _ in BAD.values())]
    lines += [json.dumps({**GOOD, "id": 100 + i}).encode() for i in range(20)]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "test.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({**GOOD, "id": i}) + "\n" for i in range(20)) + "{}\n")
    return tmp_path


def test_all_bad_rows_are_told_at_once_and_nothing_is_trained(folder, tmp_path, capsys, pico_folders) -> None:
    task = json.dumps(
        {"data": str(folder / "train.jsonl"), "test_data": str(folder / "test.jsonl"), "labels": ["yes", "no"]}
    )
    run = ["run", "--model", pico_folders["llama"], "--output_dir", str(tmp_path / "run")]
    assert main([*run, "--tasks", task, str(folder / "other.jsonl")]) == 2
    error = capsys.readouterr().err
    path = folder / "train.jsonl"
    for line, (_, what) in BAD.items():
        found = [x for x in error.splitlines() if f"{path}:{line}: " in x]
        assert len(found) == 1, (line, error)
        assert what.format(path=path) in found[0]
    assert "task 'train' has no test rows" in error
    assert f"{folder / 'other.jsonl'}:21: " in error
    assert f"{len(BAD) + 3} things are wrong" in error
    assert "--bad_rows drop" in error
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_every_row_is_told_once(tmp_path) -> None:
    rows = [json.dumps({**GOOD, "id": i, "prompt": "x"}).replace("prompt", "promt") + "\n" for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(rows))
    entry = {"data": str(tmp_path / "t.jsonl"), "prompt": "prompt", "completion": "completion"}
    with pytest.raises(PmLlmError) as raised:
        load_tasks(RunConfig(tasks=[entry]))
    lines = [line for line in str(raised.value).splitlines() if "column 'prompt' is missing" in line]
    assert len(lines) == 1
    assert "t.jsonl:1: " in lines[0]
    assert "Did you mean 'promt'?" in lines[0]
    assert lines[0].endswith("(also 2-40)")
    assert "Say what the columns are called (`prompt: question`)." in str(raised.value)
    assert "bad_rows" not in str(raised.value)  # it would drop every row


def test_bad_rows_can_be_left_out(folder, capsys) -> None:
    entry = {"data": str(folder / "train.jsonl"), "labels": ["yes", "no"]}
    (task,) = load_tasks(RunConfig(tasks=[entry], bad_rows="drop"))
    assert len(task.train) + len(task.test) == 21
    assert f"{folder / 'train.jsonl'}: {len(BAD)} bad rows left out" in capsys.readouterr().out
    empty = {**entry, "test_data": str(folder / "test.jsonl")}
    with pytest.raises(PmLlmError, match="has no test rows"):  # no row to leave out mends this
        load_tasks(RunConfig(tasks=[empty], bad_rows="drop"))


@pytest.mark.parametrize(
    ("name", "text", "line", "what"),
    [
        ("a.json", '[{"prompt": "x",\n "completion": "y"},\n\n {"prompt": "x"}]', 4, "'completion' is missing"),
        ("a.json", '[{"prompt": "x", "completion": "y"},\n {"prompt": ]', 2, "is not valid JSON"),
        ("a.json", '{"rows": 1}', 1, "columns are rows"),
        ("a.json", '[{"prompt": "x", "completion": ""},  {"prompt": "x", "completion": "y"}]', 1, "is empty"),
        ("a.csv", 'prompt,completion\n"two\nlines",y\nx\n', 4, "has 1 cells; the header has 2"),
        ("a.csv", "prompt,completion\n\n\nx,y\nx\n", 5, "has 1 cells; the header has 2"),
        ("a.csv", "prompt,prompt\nx,y\n", 1, "column 'prompt' occurs twice"),
        ("a.json", '[{"prompt": "x", "completion": "y"}]\n[{"prompt": "x", "completion": "y"}]', 2, "Extra data"),
        ("a.jsonl", '{"prompt": "x", "completion": "y", "id": ' + "9" * 5000 + "}\n", 1, "cannot be read"),
        ("a.jsonl", "[" * 100_000 + "\n", 1, "cannot be read"),
        ("a.csv", "prompt,completion\nx,y\nx,y,z\n", 3, "has 3 cells; the header has 2"),
        ("a.csv", 'prompt,completion\nx,"y"z\n', 2, "is not valid CSV"),
    ],
)
def test_lines_of_other_files(name: str, text: str, line: int, what: str, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PmLlmError) as error:
        load_tasks(RunConfig(tasks=[str(tmp_path / name)]))
    (found,) = [x for x in str(error.value).splitlines() if re.search(rf"{name}:{line}( \(row \d\))?: ", x)]
    assert what in found


def test_rows_of_one_line_are_told_apart(tmp_path, capsys) -> None:
    """A JSON array without line breaks, as TRACE's files are."""
    rows = [{"id": 7, "prompt": f"p{i}", "completion": "" if i % 4 == 1 else "x"} for i in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(PmLlmError) as error:
        load_tasks(RunConfig(tasks=[str(tmp_path / "a.json")]))
    said = [line for line in str(error.value).splitlines() if "a.json:1" in line]
    alone = [int(re.search(r"a\.json:1 \(row (\d+)\): ", line)[1]) for line in said]
    (same,) = [line for line in said if "its id '7' is that of" in line]
    ranges = [part.split("-") for part in re.search(r"\(also ([\d, -]+)\)", same)[1].split(", ")]
    others = [n for part in ranges for n in range(int(part[0]), int(part[-1]) + 1)]
    assert len([*alone, *others]) == len({*alone, *others}) == 11  # all but one of those with an answer
    assert len(others) == 7
    with pytest.raises(PmLlmError, match="has no t"):  # one good row is left, and one split is empty
        load_tasks(RunConfig(tasks=[str(tmp_path / "a.json")], bad_rows="drop"))


def test_a_file_with_many_rows_is_read_in_time(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(50_000))
    )
    (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / "a.jsonl")]))
    assert len(task.train) + len(task.test) == 50_000


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"test_split": "heldout"},
            "has no split 'heldout'; it has held_out, predict, train",
        ),
        ({"validation_split": "val"}, "has no split 'val'"),
        ({"labels": [True, False]}, "labels: True is no text. Quote it"),
        ({"test_size": 1.5}, "test_size is 1.5"),
        ({"seed": -1}, "with seed -1"),
    ],
)
def test_settings_of_a_task_that_cannot_be(entry: dict, said: str, tmp_path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("train", "held_out"):
        (folder / f"{name}.jsonl").write_text((json.dumps({"prompt": "x", "completion": "y"}) + "\n") * 12)
    (folder / "predict.jsonl").write_text("no rows at all")  # not asked for, so not read
    with pytest.raises(PmLlmError, match=re.escape(said)):
        load_tasks(RunConfig(tasks=[{"data": str(folder), **entry}]))
    (task,) = load_tasks(RunConfig(tasks=[{"data": str(folder), "test_split": "held_out"}]))
    assert (len(task.train), len(task.test)) == (12, 12)


def test_hidden_labels_of_a_split_that_is_not_used(tmp_path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    shown = Dataset.from_dict({"text": ["a", "b"] * 5, "label": [0, 1] * 5}, features=features)
    hidden = Dataset.from_dict({"text": ["c"] * 3, "label": [-1] * 3}, features=features)
    DatasetDict(train=shown, validation=shown, test=hidden, unsupervised=hidden).save_to_disk(str(tmp_path / "d"))
    (task,) = load_tasks(RunConfig(tasks=[{"data": str(tmp_path / "d"), "test_split": "validation"}]))
    assert len(task.test) == 10
    with pytest.raises(PmLlmError, match=r"d/test:row 1: label is None"):
        load_tasks(RunConfig(tasks=[str(tmp_path / "d")]))


def test_a_csv_cell_of_any_size_and_a_byte_order_mark(tmp_path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\n" + b"x" * 500_000 + b",y\r\n")
    problems = Problems()
    (row,) = read_rows(tmp_path / "a.csv", problems)
    assert not problems.found
    assert len(row.values["prompt"]) == 500_000
    assert row.values["completion"] == "y"


def test_class_labels_become_their_names(tmp_path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": ["a", "b"] * 5, "label": [0, 1] * 5}, features=features).save_to_disk(
        str(tmp_path / "d")
    )
    (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / "d")]))
    assert {(row.prompt, row.completion) for row in [*task.train, *task.test]} == {("a", "bad"), ("b", "good")}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n\n1 2", "3"),
        ({"instruction": "sing", "input": "", "output": "la"}, "sing", "la"),
        ({"instruction": "when", "context": "in 1921", "response": "1921"}, "when\n\nin 1921", "1921"),
        ({"instruction": "i", "input": "in", "context": "c", "output": "o"}, "i\n\nin\n\nc", "o"),
        ({"question": "q", "context": "", "answer": "a"}, "q", "a"),
        ({"question": "q", "context": " ", "answer": "a"}, "q", "a"),
        ({"text": "t", "label": "l"}, "t", "l"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q", "a"),
    ],
)
def test_columns_are_found(row: dict, prompt: str, completion: str, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 10)
    (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / "a.jsonl")]))
    assert (task.train[0].prompt, task.train[0].completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, "context"),
        ({"question": "q", "context": {"from": "x"}, "answer": "a"}, "context"),
        ({"instruction": "i", "context": ["c"], "output": "o"}, "context"),
        ({"question": "q", "choices": ["x", "y"], "answer": "a"}, "choices"),
        ({"sentence": "s", "question": "q", "label": "l"}, "question"),
        ({"prompt": "q", "completion": "a", "hint": ["s"], "idx": 3, "note": " "}, "hint"),
    ],
)
def test_what_is_left_out_is_named_with_what_to_do(row: dict, left: str, tmp_path, capsys) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(row) + "\n") * 10)
    for bad_rows in ("error", "drop"):  # it is no row's fault
        with pytest.raises(PmLlmError, match=rf"leave out {left}\. ") as error:
            load_tasks(RunConfig(tasks=[str(path)], bad_rows=bad_rows))
        assert len(str(error.value).splitlines()) == 1
        assert "--bad_rows" not in str(error.value)
    (task,) = load_tasks(RunConfig(tasks=[{"data": str(path), "ignore": [left]}]))
    assert len(task.train) == 9
    said = capsys.readouterr().out
    assert (f"{path}: not used: idx" in said) == ("idx" in row)
    first = next(iter(row))
    named = {"data": str(path), "prompt": first, "completion": list(row)[1 if "idx" in row else -1]}
    (task,) = load_tasks(RunConfig(tasks=[named]))
    assert task.train[0].prompt == row[first]
    assert "not used: " in capsys.readouterr().out  # named by the user, and told


def test_a_prompt_of_several_columns(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"question": "q", "choices": ["x", "y"], "n": 3, "answer": "a"}) + "\n") * 10)
    for prompt, expected in (
        (["question", "choices"], "q\n\nx\ny"),
        ("{question} of {n}:\n{choices}", "q of 3:\nx\ny"),
    ):
        (task,) = load_tasks(RunConfig(tasks=[{"data": str(path), "prompt": prompt, "completion": "answer"}]))
        assert task.train[0].prompt == expected
    with pytest.raises(PmLlmError, match="column 'chioces' is missing"):
        load_tasks(RunConfig(tasks=[{"data": str(path), "prompt": "{question} {chioces}", "completion": "answer"}]))


def test_names_of_parquet_files_are_no_patterns(tmp_path) -> None:
    for name, word in (("part1", "wrong"), ("part[1]", "right"), ("a*b", "right"), ("a-b", "wrong")):
        rows = {"prompt": [f"p{i}" for i in range(10)], "completion": [word] * 10}
        Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    for name in ("part[1]", "a*b"):
        (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / f"{name}.parquet")]))
        assert {row.completion for row in task.train} == {"right"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 12, mtime=0)),
        ("a.json", json.dumps({"version": "1", "rows": [{"prompt": "p", "completion": "c"}] * 12}).encode()),
        ("a.csv", b"prompt;completion\n" + b"p;c\n" * 12),
        ("a.csv", b"prompt|completion\n" + b"p|c\n" * 12),
        ("a.tsv", b"prompt\tcompletion\n" + b"p\tc\n" * 12),
        ("a.jsonl", b'{"question": "p", "answers": {"text": ["c", "d"], "answer_start": [0, 1]}}\n' * 12),
    ],
)
def test_kinds_of_files(name: str, content: bytes, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    (task,) = load_tasks(RunConfig(tasks=[str(tmp_path / name)]))
    assert (task.name, len(task.train) + len(task.test)) == ("a", 12)
    assert (task.train[0].prompt, task.train[0].completion) == ("p", "c")
    assert task.train[0].alternatives == (("d",) if b"answers" in content else ())


def test_a_gzip_file_that_is_cut(tmp_path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 12, mtime=0)[:-9])
    with pytest.raises(PmLlmError, match="is not a whole gzip file"):
        load_tasks(RunConfig(tasks=[str(tmp_path / "a.jsonl.gz")]))


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet"])
def test_a_format_is_no_dataset(name: str, tmp_path, monkeypatch) -> None:
    """`datasets` would read every file of it below the working folder."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 12)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PmLlmError, match=f"'{name}' is a file format"):
        load_tasks(RunConfig(tasks=[name]))


def test_bad_rows_of_a_probe(tmp_path, capsys) -> None:
    """Its file is read for training and test rows alike; a bad row is one all the same."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "x" * (i < 6)}) + "\n" for i in range(9)))
    with pytest.raises(PmLlmError, match="3 things are wrong"):
        load_probes(RunConfig(probes=[str(path)]))
    (probe,) = load_probes(RunConfig(probes=[str(path)], bad_rows="drop"))
    assert len(probe.test) == 6
    assert capsys.readouterr().out.count("3 bad rows left out") == 1
    for name in ("nothing.jsonl", "./nothing"):
        with pytest.raises(PmLlmError, match=r"^\S*nothing\S*: "):  # told once
            load_probes(RunConfig(probes=[name]))


def test_a_validation_share_is_split_off_and_scored(tmp_path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "x"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"data": str(tmp_path / "a.jsonl"), "test_size": 0.2, "validation_size": 0.25}
    (task,) = load_tasks(RunConfig(tasks=[entry]))
    assert [len(x) for x in (task.train, task.validation, task.test)] == [60, 20, 20]
    assert len({row.prompt for row in [*task.train, *task.validation, *task.test]}) == 100
    config = RunConfig(tasks=[entry])
    config.evaluation.split = "validation"
    (tuned,) = load_tasks(config)
    assert tuned.test == task.validation
    config.tasks = [str(tmp_path / "a.jsonl")]
    with pytest.raises(PmLlmError, match="no validation rows"):
        load_tasks(config)


def test_ids_are_those_of_a_file_also_where_it_is_split(tmp_path) -> None:
    """Two rows of one id are found whether or not they fall into the same split; two files may use the same ids."""
    rows = [json.dumps({**GOOD, "id": i % 20}) + "\n" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with pytest.raises(PmLlmError) as error:
        load_tasks(RunConfig(tasks=[{"data": str(tmp_path / "a.jsonl"), "test_size": 0.5}]))
    assert str(error.value).count("its id") == 20
    for name in ("train", "test"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.jsonl").write_text("".join(rows[:20]))
    load_tasks(RunConfig(tasks=[str(tmp_path / "two")]))
