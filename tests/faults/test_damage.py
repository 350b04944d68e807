"""Each file of a run's folder damaged in turn: told by name with what to do, or mended; never a wrong result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pm_llm.cli import main
from tests.conftest import FAMILIES
from tests.faults.conftest import KILLS, arguments, same_outcome

# what a run writes for people: made again when it is damaged
MADE_AGAIN = ("config.yaml", "results.json", "matrix.png", "adapter")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1 << random.Random(str(len(content))).randrange(8)
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


WAYS = [truncate, zero, flip_a_bit, remove]


def commands(run: Path, model: str) -> dict[str, list[str]]:
    """What may be asked of a run's folder."""
    tasks = ["--model", model, "--benchmark", "embedded", "--order", "topic", "--max_test_samples", "2"]
    return {
        "run": [*arguments(model), "--output_dir", str(run)],
        "report": ["report", str(run), "--out", str(run.parent / "report")],
        "push": ["push", str(run), "me/it", "--dry-run"],
        "score": ["score", str(run)],
        "status": ["status", str(run)],
        "evaluate": ["evaluate", "--adapter", str(run / "adapter"), "--max_length", "96", *tasks],
    }


def outcome(argv: list[str], capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(argv)
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return status, found.out, found.err


@pytest.mark.parametrize("way", WAYS if KILLS > 4 else [flip_a_bit, remove], ids=lambda way: way.__name__)
def test_every_file_of_a_finished_run(way, whole, pico_folders, tmp_path, capsys) -> None:
    files = sorted(
        p.relative_to(whole["llama"]) for p in whole["llama"].rglob("*") if p.is_file() and p.name != ".lock"
    )
    files = [path for path in files if path.parts[0] != "adapter"]  # the link is a case of its own
    assert len(files) > 25
    run, model = tmp_path / "run", pico_folders["llama"]
    shutil.copytree(whole["llama"], tmp_path / "good", symlinks=True)
    asked = {name: argv for name, argv in commands(tmp_path / "good", model).items() if name != "run"}
    good = {name: outcome(argv, capsys)[:2] for name, argv in asked.items()}
    for name in files:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole["llama"], run, symlinks=True)
        way(run / name)
        told = set()
        for command, argv in commands(run, model).items():
            if command == "run" or (command == "evaluate" and not (run / "adapter").exists()):
                continue
            status, said, error = outcome(argv, capsys)
            assert status in (0, 2), (name, command, error)
            if status == 0 and command != "status":
                assert said == good[command][1].replace(f"{tmp_path}/good", str(run)), (name, command)
            if status == 2:
                assert error.count("pm-llm: error:") == 1
            if str(name) in error + (said if command == "status" else ""):
                told.add(command)
        assert "status" in told, name  # it looks at everything
        status, said, error = outcome(commands(run, model)["run"], capsys)
        if str(name) in MADE_AGAIN:
            assert status == 0, error
            same_outcome(run, whole["llama"])
            assert "damaged" not in outcome(commands(run, model)["status"], capsys)[1]
        else:
            assert status == 2, name
            assert str(name) in error
            assert "from a copy" in error


def test_the_link_to_the_adapter(whole, pico_folders, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    for target in (None, "stages/01-sentiment/adapter", "/tmp"):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole["llama"], run, symlinks=True)
        (run / "adapter").unlink()
        if target is not None:
            (run / "adapter").symlink_to(target)
        said = outcome(commands(run, "")["status"], capsys)[1]
        assert "adapter is no link to stages/03-question/adapter" in said
        assert outcome(commands(run, pico_folders["llama"])["run"], capsys)[0] == 0
        assert (run / "adapter").resolve() == (run / "stages/03-question/adapter").resolve()


@pytest.mark.parametrize("which", ["the stage", "an earlier stage"])
def test_a_damaged_stage_is_done_again(which: str, forker, whole, pico_folders, tmp_path, capsys) -> None:
    """As the error says: --restart-from keeps what is before, and curvature that is gone is computed once more."""
    run, family = tmp_path / "run", "llama"
    shutil.copytree(whole[family], run, symlinks=True)
    stage, number = ("03-question", "3") if which == "the stage" else ("02-topic", "2")
    flip_a_bit(run / f"stages/{stage}/adapter/adapter_model.safetensors")
    argv = commands(run, pico_folders[family])["run"]
    status, _, error = outcome(argv, capsys)
    assert status == 2
    assert f"--restart-from {number}" in error
    ended = forker(*argv, "--restart-from", number)
    assert ended.status == 0, ended.said
    assert ("once more" in ended.said) == (which == "an earlier stage")  # the last two stages' is kept
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (run, whole[family]))
    assert one["matrix"] == other["matrix"]
    assert one["coefficients"] == pytest.approx(other["coefficients"], rel=1e-4)
    assert outcome(argv, capsys)[0] == 0


@pytest.mark.parametrize("family", FAMILIES if KILLS > 4 else FAMILIES[:1])  # the files are alike
def test_damaged_checkpoints_are_not_gone_on_from(family: str, forker, whole, pico_folders, tmp_path) -> None:
    """Training then begins from the checkpoint before or anew, with the same outcome."""
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    argv = [*arguments(pico_folders[family]), "--output_dir", run]
    length, rng = forker(*argv).seconds, random.Random(family)
    files: list[Path] = []
    while len(files) < 8:  # killed where a checkpoint is whole
        shutil.rmtree(run, ignore_errors=True)
        forker(*argv, kill=rng.uniform(0.2, 0.8) * length)
        files = sorted(p.relative_to(run) for p in run.glob("work/*/checkpoint-*/**/*") if p.is_file())
    run.rename(stopped)
    for number, name in enumerate(rng.sample(files, len(files) if KILLS > 4 else 3)):
        shutil.copytree(stopped, run, symlinks=True)
        WAYS[number % 4](run / name)
        assert forker(*argv).status == 0
        same_outcome(run, whole[family])
        shutil.rmtree(run)
