"""A run's folder never reaches out of itself: links, pipes and names of ours that are somebody's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from pm_llm.run.folder import RunDir
from pm_llm.system.files import new_folder, replace_bytes
from tests.helpers.rows import rows, run_of


@pytest.fixture(scope="module")
def finished(pico_folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return run_of(pico_folders["llama"], rows(folder / "a.jsonl"), folder / "run")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def again(run: Path, finished: Path, pico_folders, *more: str) -> int:
    keys = ["--model", pico_folders["llama"], "--tasks", str(finished.parent / "a.jsonl"), "--output_dir", str(run)]
    return main(["run", *keys, "--train.max_steps", "1", "--max_length", "64", "--fisher.samples", "2", *more])


@pytest.mark.parametrize("name", ["work", "stages", "untrained"])
def test_what_lies_behind_a_link_is_left_alone(name: str, run, finished, pico_folders, tmp_path, capsys) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "99-mine").mkdir(parents=True)
    (scratch / "99-mine" / "file").write_text("mine")
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(scratch)
    assert again(run, finished, pico_folders) == 2
    assert f"{run / name} is a link" in capsys.readouterr().err
    assert (scratch / "99-mine" / "file").read_text() == "mine"


def test_what_is_not_ours_is_not_swept(run, finished, pico_folders) -> None:
    for place in ("work", "stages"):
        (run / place / "notes").mkdir(parents=True)
        (run / place / "notes" / "file").write_text("mine")
    assert again(run, finished, pico_folders) == 0
    for place in ("work", "stages"):
        assert (run / place / "notes" / "file").read_text() == "mine"


def test_a_state_that_is_no_file(run, finished, pico_folders, capsys) -> None:
    kept = (run / "state.json").read_bytes()
    before = sorted(path.name for path in (run / "stages").rglob("*"))
    for make in (os.mkfifo, lambda path: path.symlink_to("nowhere"), Path.mkdir):
        (run / "state.json").unlink(missing_ok=True)
        make(run / "state.json")
        for command in (lambda: again(run, finished, pico_folders), lambda: main(["status", str(run)])):
            assert command() == 2
            assert "is no ordinary file" in capsys.readouterr().err
        assert sorted(path.name for path in (run / "stages").rglob("*")) == before
        if (run / "state.json").is_dir():
            (run / "state.json").rmdir()
    (run / "state.json").unlink(missing_ok=True)
    (run / "state.json").write_bytes(kept)
    assert main(["status", str(run)]) == 0


def test_links_in_the_place_of_our_files_are_not_written_through(
    run, finished, pico_folders, tmp_path, capsys
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (run / ".state.json.tmp").symlink_to(mine)
    assert again(run, finished, pico_folders) == 0
    replace_bytes(run / "x", b"y")
    assert mine.read_text() == "mine"
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(mine)
    assert again(run, finished, pico_folders) == 2
    assert ".lock is a link" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_adapter_file_that_links_out_is_not_pushed(run, tmp_path, capsys) -> None:
    (adapter,) = (run / "stages").glob("*/adapter")
    secret = tmp_path / "secret"
    (adapter / "adapter_config.json").rename(secret)
    (adapter / "adapter_config.json").symlink_to(secret)
    assert main(["push", str(run), "user/name", "--base-model", "org/base", "--dry-run"]) == 2
    assert "is not as the run wrote it" in capsys.readouterr().err


def test_a_lock_file_that_is_removed_lets_nobody_in(run) -> None:
    import subprocess
    import sys

    with RunDir(run).locked():
        (run / ".lock").unlink()
        script = f"from pm_llm.run.folder import RunDir\nwith RunDir({str(run)!r}).locked(): print('in')"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
    assert done.returncode != 0
    assert "is in use by" in done.stderr


def test_states_of_other_formats_and_with_missing_keys(run, capsys) -> None:
    from pm_llm.system.files import sha256_of

    def write(change) -> None:
        state = json.loads((run / "state.json").read_text())
        state.pop("digest", None)
        change(state)
        (run / "state.json").write_text(json.dumps({**state, "digest": sha256_of(state)}))

    assert json.loads((run / "state.json").read_text())["format"] == 4
    for change, said in (
        (lambda state: state.update(format=99), "of format 99, of a newer pm_llm"),
        (lambda state: state.update(format=3), "of an older pm_llm"),
        (
            lambda state: state.update(format=4) or state["stages"][0].pop("coefficient"),
            "other content than was written",
        ),
        (lambda state: state.update(stages=[1]), "other content than was written"),
    ):
        write(change)
        assert main(["status", str(run)]) == 2
        assert said in capsys.readouterr().err


def test_what_a_killed_command_left_is_swept_by_the_next(tmp_path) -> None:
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".out.abc.{dead.pid}.unfinished"
    alive = tmp_path / f".out.abc.{os.getppid()}.unfinished"
    for folder in (left, alive):
        folder.mkdir()
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
    assert not left.exists()
    assert alive.exists()
    assert (tmp_path / "out").stat().st_mode & 0o755 == 0o755
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PmLlmError, match="exists"), new_folder(tmp_path / "link"):
        pass


def test_files_can_be_read_by_others(run) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in run.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.stat().st_mode & 0o444 & ~mask == 0o444 & ~mask, path
