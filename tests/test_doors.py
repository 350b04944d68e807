"""What comes in is cleaned or refused at the door: names, secrets, values without end; what goes out stops nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pm_llm.cli import main
from pm_llm.config import RunConfig, load_config
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.predictions import gather
from pm_llm.tasks.loading import load_tasks
from tests.helpers.rows import rows, run_of

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "keys",
    [
        {"train.extra": {"hub_token": "x"}},
        {"train.extra": {"report_to": TOKEN}},
        {"tasks": [{"data": "a", "api_key": "x"}]},
        {"train.extra": {"nested": {"password": "x"}}},
    ],
)
def test_secrets_are_refused(keys: dict) -> None:
    with pytest.raises(PmLlmError, match="in the environment") as error:
        load_config(None, keys).check()
    assert TOKEN not in str(error.value)
    load_config(None, {"train.extra": {"include_num_input_tokens_seen": "all"}}).check()


def test_no_token_ends_up_in_a_run(pico_folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = run_of(pico_folders["llama"], rows(tmp_path / "a.jsonl"), tmp_path / "run")
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_name_with_an_emoji_as_json_writes_it(tmp_path) -> None:
    entry = json.dumps({"data": str(rows(tmp_path / "a.jsonl")), "name": "law \U0001f600"})
    assert "\\ud83d" in entry
    (task,) = load_tasks(load_config(None, {"tasks": [json.loads(entry.replace("\\", "\\"))]}))
    assert task.name == "law \U0001f600"
    from pm_llm.commands.keys import parse_overrides

    (task,) = load_tasks(load_config(None, parse_overrides(["--tasks", entry])))
    assert task.name == "law \U0001f600"


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "\ud83d", " ", "x" * 300])
def test_names_that_cannot_be_printed_are_refused(name: str, tmp_path) -> None:
    with pytest.raises(PmLlmError):
        load_tasks(load_config(None, {"tasks": [{"data": str(rows(tmp_path / "a.jsonl")), "name": name}]}))


def test_a_configuration_without_end(tmp_path, capsys) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "more than 100,000 values" in capsys.readouterr().err
    with pytest.raises(PmLlmError, match=r"lora\.r is 100000000"):
        RunConfig(lora=load_config(None, {"lora.r": 100_000_000}).lora).check()


@pytest.mark.parametrize("of", [10**12, 0, "x", True, None])
def test_predictions_of_a_number_of_rows_that_cannot_be(of: object) -> None:
    line = {"task": "a", "scorer": "exact_match", "row": 0, "of": of, "prediction": "x", "references": ["x"]}
    with pytest.raises(PmLlmError):
        gather([line])


def test_paths_on_the_command_line_are_text(tmp_path, monkeypatch) -> None:
    from pm_llm.commands.keys import parse_overrides

    assert parse_overrides(["--output_dir", "runs/exp #2", "--model", "1e5"]) == {
        "output_dir": "runs/exp #2",
        "model": "1e5",
    }
    assert parse_overrides(["--tasks", "a: b.jsonl", "{data: c}"])["tasks"] == ["a: b.jsonl", {"data": "c"}]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop/x"])
def test_names_that_no_disk_takes_are_one_line(name: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for command in (["status", name], ["score", name], ["evaluate", "--adapter", name], ["run", "--output_dir", name]):
        more = ["--tasks", str(rows(tmp_path / "a.jsonl"))] if command[0] in ("evaluate", "run") else []
        assert main([*command, *more]) == 2, command
        error = capsys.readouterr().err
        assert error.count("pm-llm: error: ") == 1
        assert "Traceback" not in error


def test_nobody_reads_what_is_printed() -> None:
    script = "import sys; from pm_llm.cli import main; sys.exit(main(['methods']))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{script}" | head -1; echo ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_does_not_end_a_run(pico_folders, tmp_path) -> None:
    keys = [
        "--model",
        pico_folders["llama"],
        "--tasks",
        str(rows(tmp_path / "a.jsonl")),
        str(rows(tmp_path / "b.jsonl")),
    ]
    keys += [
        "--output_dir",
        str(tmp_path / "run"),
        "--train.max_steps",
        "1",
        "--max_length",
        "64",
        "--fisher.samples",
        "2",
    ]
    words = json.dumps(["run", *keys])
    script = f"import sys; from pm_llm.cli import main; sys.exit(main({words}))"
    (tmp_path / "s.py").write_text(script)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {tmp_path / 's.py'} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert (tmp_path / "run/results.json").is_file()
