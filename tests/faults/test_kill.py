"""SIGKILL at random instants: a crash is invisible (law 7)."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pm_llm.cli import main
from pm_llm.run.reading import STATE, WORK
from pm_llm.system.files import remove_tree
from tests.conftest import FAMILIES
from tests.faults.conftest import KILLS, arguments, every_adapter_loads, same_outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_at_random_instants(family: str, forker, whole, pico_folders, tmp_path) -> None:
    """Each run is killed again and again, until it is done; then the next begins."""
    rng = random.Random(f"{family} {os.environ.get('PM_LLM_KILLS_SEED', '0')}")
    run = [*arguments(pico_folders[family]), "--output_dir", tmp_path / "run"]
    length = forker(*run).seconds
    same_outcome(tmp_path / "run", whole[family])
    kills = rounds = 0
    while kills < KILLS:
        shutil.rmtree(tmp_path / "run")
        rounds += 1
        status = None
        while status != 0:
            # drawn over what is left of a run, so that its end is hit as often as its beginning
            instant = rng.uniform(0, length) if kills < KILLS else None
            ended = forker(*run, kill=instant)
            status = ended.status
            assert status in (0, -signal.SIGKILL), ended.said
            kills += status != 0
            every_adapter_loads(tmp_path / "run")
            length = length if instant is not None or kills else ended.seconds
        same_outcome(tmp_path / "run", whole[family])
    print(f"{family}: {kills} kills in {rounds} runs")


def test_the_adapter_loads_at_every_moment(forker, pico_folders, tmp_path) -> None:
    """Another thread loads every adapter of the folder all the time while the run goes on."""
    run, failures, seen, done = tmp_path / "run", [], [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.append(every_adapter_loads(run))
            except Exception as error:
                if not _is_gone(error, run):
                    failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ended = forker(*arguments(pico_folders["llama"]), "--output_dir", run)
    done.set()
    watcher.join()
    assert ended.status == 0, ended.said
    assert not [str(error) for error in failures]
    assert max(seen) >= 7
    assert len(set(seen)) > 3


def test_a_removal_that_is_killed_leaves_no_part_under_the_name(tmp_path, monkeypatch) -> None:
    folder, whole = tmp_path / "checkpoint-4", shutil.rmtree

    def killed(path, *_: object, **__: object) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    for _ in range(2):  # the second removal takes away what the first has left
        folder.mkdir()
        for name in ("configuration", "weights"):
            (folder / name).write_text(name)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                remove_tree(folder)
        assert not folder.exists()
        folder.mkdir()
        assert shutil.rmtree is whole
        remove_tree(folder)
        assert list(tmp_path.iterdir()) == []


def _is_gone(error: Exception, run: Path) -> bool:
    """Whether a checkpoint, a temporary folder or what holds them was removed, as it should be, under our eyes."""
    return re.search(rf"/({WORK}\b|\.)", str(error).partition(str(run))[2]) is not None


@pytest.mark.parametrize(
    ("name", "gone"), [("work", True), ("work/01-a", True), (".adapter.tmp", True), ("adapter", False)]
)
def test_what_may_be_gone(name: str, gone: bool, tmp_path) -> None:
    """An error names the folder that is no longer there, which may be the one above all checkpoints."""
    with pytest.raises(FileNotFoundError) as found:
        list((tmp_path / name).iterdir())
    assert _is_gone(found.value, tmp_path) is gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_leaves_a_checkpoint(number: int, forker, whole, pico_folders, tmp_path, capsys) -> None:
    run = [*arguments(pico_folders["llama"], **{"train.save_steps": 1000}), "--output_dir", tmp_path / "run"]
    length = forker(*run).seconds
    rng, checkpoints = random.Random(int(number)), 0
    for draw in range(40):
        if draw >= max(3, KILLS // 4) and checkpoints:
            break
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ended = forker(*run, kill=rng.uniform(0.2, 0.9) * length, number=number)
        # before and after the run itself, SIGTERM does what it does to any process
        assert ended.status in (0, 128 + number, -signal.SIGTERM), ended.said
        assert "Traceback" not in ended.said
        if ended.status == 128 + number:
            assert f"stopped by {signal.Signals(number).name}" in ended.said or "interrupted" in ended.said
            if (tmp_path / "run" / STATE).exists():  # SIGINT is answered politely before there is a run, too
                capsys.readouterr()
                assert main(["status", str(tmp_path / "run")]) == 0
                checkpoints += "checkpoint at step" in capsys.readouterr().out
            assert forker(*run).status == 0
            same_outcome(tmp_path / "run", whole["llama"])
    assert checkpoints


class KilledError(BaseException):
    """Ends a command at an instant, as a signal would: no `except Exception` holds it."""


@contextmanager
def killed_at(instant: int) -> Iterator[None]:
    """Within the block, the process ends before (even) or after (odd) a file or link gets its name."""
    real, seen = os.replace, 0

    def replace(source: Any, target: Any, **more: Any) -> None:
        nonlocal seen
        for real_one in (False, True):
            if real_one:
                real(source, target, **more)
            if seen == instant:
                raise KilledError
            seen += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


@pytest.mark.parametrize("command", ["report", "restart", "run"])
def test_status_calls_nothing_damaged_that_was_being_replaced(command, whole, pico_folders, tmp_path, capsys) -> None:
    model, run = pico_folders["llama"], tmp_path / "run"
    shutil.copytree(whole["llama"], tmp_path / "before", symlinks=True)
    assert main(["report", str(tmp_path / "before")]) == 0
    argv = {
        "report": ["report", str(run), str(whole["llama"])],
        "restart": [*arguments(model), "--output_dir", str(run), "--restart-from", "question"],
        "run": [*arguments(model, **{"order": "sentiment,topic,question,puzzle"}), "--output_dir", str(run)],
    }[command]
    for instant in range(0, 100, 3) if command == "report" else range(10):  # a report draws anew each time
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "before", run, symlinks=True)
        try:
            with killed_at(instant):
                assert main(argv) == 0
            break
        except KilledError:
            pass
        capsys.readouterr()
        assert main(["status", str(run)]) == 0
        assert "damaged" not in capsys.readouterr().out, instant
    assert instant > 4
    assert main(argv) == 0
    assert main(["status", str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_status_says_what_comes_next(forker, pico_folders, tmp_path, capsys) -> None:
    run = [*arguments(pico_folders["llama"]), "--output_dir", tmp_path / "run"]
    length = forker(*run).seconds
    assert main(["status", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "next: nothing, it is finished" in said
    assert "at work: nobody" in said
    assert "added to plain training:" in said
    assert "peak memory: train" in said
    found = set()
    for part in range(2, 10, 2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        forker(*run, kill=length * part / 10)
        if not (Path(tmp_path) / "run/state.json").exists():
            continue
        assert main(["status", str(tmp_path / "run")]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
        found.add(line.split(" ")[1])
    assert "train" in found
