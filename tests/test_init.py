"""`pm-llm init`: what it writes for rows and a model, and that it runs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pm_llm.cli import main
from pm_llm.commands._propose import Seen, choose
from pm_llm.config import load_config
from tests.helpers.errors import one_line


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with three files: short answers, other columns, and long answers."""
    monkeypatch.chdir(tmp_path)
    short = [{"prompt": f"is {i} even ?", "completion": "no" if i % 2 else "yes"} for i in range(30)]
    long = [
        {"prompt": f"tell {i}", "completion": f"the number {i} is one of very many in the list"} for i in range(30)
    ]
    for name, rows in (("short", short), ("long", long)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mails.csv").write_text("subject;queue\n" + "".join(f"mail {i};{'ab'[i % 2]}\n" for i in range(30)))
    return tmp_path


MAILS = "{data: mails.csv, prompt: subject, completion: queue}"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_written_runs(family: str, here: Path, pico_folders, capsys) -> None:
    given = ["short.jsonl", MAILS, "long.jsonl", "--model", pico_folders[family], "--output_dir", "runs/it"]
    assert main(["init", *given]) == 0
    said = capsys.readouterr().out
    assert "long: 27 rows to train on, 3 to test on; answers of 11 words" in said
    assert "pm-llm run --config my.yaml" in said
    config = load_config("my.yaml").check()
    assert [getattr(one, "get", lambda _: None)("scorer") for one in config.tasks] == [None, None, "rougeL"]
    assert config.method == "pm_curvature"
    assert config.max_length % 64 == 0
    assert config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps == 8
    few = ["--train.max_steps", "2", "--fisher.samples", "2", "--dtype", "float32", "--max_new_tokens", "4"]
    assert main(["run", "--config", "my.yaml", *few]) == 0
    assert json.loads((here / "runs/it/results.json").read_text())["tasks"] == ["short", "mails", "long"]


def test_what_cannot_be_written(here: Path, pico_folders, capsys) -> None:
    (here / "my.yaml").write_text("mine: yes\n")
    one_line(main(["init", "short.jsonl"]), capsys.readouterr().err, "my.yaml exists. Give another file with --out")
    model = ["--out", "new.yaml", "--model", pico_folders["llama"]]
    one_line(main(["init", *model]), capsys.readouterr().err, "no tasks are given. Name them: pm-llm init DATA")
    one_line(
        main(["init", "mails.csv", *model]), capsys.readouterr().err, "the columns are subject, queue", "{data: FILE"
    )
    assert not (here / "new.yaml").exists()
    assert (here / "my.yaml").read_text() == "mine: yes\n"


def test_it_asks_on_a_terminal(here: Path, pico_folders) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "pm_llm", "init"]
    process = subprocess.Popen(
        command, cwd=here, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    os.write(master, f"short.jsonl long.jsonl\n{pico_folders['llama']}\n\n".encode())
    said, _ = process.communicate(timeout=120)
    os.close(master)
    os.close(slave)
    assert process.returncode == 0, said
    config = load_config(here / "my.yaml")
    assert (config.model, config.output_dir) == (pico_folders["llama"], "runs/mine")
    assert config.tasks == ["short.jsonl", {"data": "long.jsonl", "scorer": "rougeL"}]


def test_choices_follow_the_model(monkeypatch) -> None:
    from pm_llm.commands import _propose
    from tests.helpers.kinds import kind_tasks

    tasks = kind_tasks("prompt")
    monkeypatch.setattr(_propose, "_device_bytes", lambda: 24 * 2**30)

    def of(parameters: float, prompt: int = 100) -> dict:
        seen = Seen(int(parameters), 8192, True, tasks, [prompt] * len(tasks), [20] * len(tasks))
        return {one.key: one.value for one in choose(seen)}

    small, large, long = of(135e6), of(13e9), of(1e9, 6000)
    assert small["train.learning_rate"] > long["train.learning_rate"] > large["train.learning_rate"]
    assert "load_in_4bit" not in small
    assert large["load_in_4bit"] is True
    assert large["train.gradient_checkpointing"] is True
    assert (small["max_length"], long["max_length"]) == (128, 4096)
    assert long["train.per_device_train_batch_size"] == 1
    assert long["train.gradient_accumulation_steps"] == 8
