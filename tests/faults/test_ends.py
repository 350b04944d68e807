"""Full disks, lost permission, clocks set back, second processes: a clear end, and going on works after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from pm_llm.run.folder import RunDir
from pm_llm.system.files import writing
from pm_llm.system.lock import Lock
from tests.conftest import ROOT
from tests.faults.conftest import arguments, every_adapter_loads, same_outcome

MAY_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def one_error(said: str) -> str:
    assert "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("pm-llm: error:"))
    return line


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a file system of its own")
def test_a_full_disk(whole, pico_folders, tmp_path) -> None:
    """On a small file system of the test's own, which then grows a little at a time, until the run is done."""
    place = tmp_path / "disk"
    place.mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, sys, shutil\n"
        "from pm_llm.cli import main\n"
        "from tests.faults.conftest import every_adapter_loads\n"
        "from pathlib import Path\n"
        "place, out, *argv = sys.argv[1:]\n"
        "run = Path(place) / 'run'\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'none', place], check=True)\n"
        "for size in range(48, 2000, 48):\n"
        "    status = main([*argv, '--output_dir', str(run)])\n"
        "    every_adapter_loads(run)\n"
        "    print('STATUS', status, flush=True)\n"
        "    if status == 0: break\n"
        "    subprocess.run(['mount', '-o', f'remount,size={size}k', place], check=True)\n"
        "shutil.copytree(run, out, symlinks=True)\n"
    )
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, str(script), place, tmp_path / "run", *arguments(pico_folders["llama"])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ends = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert ends[-1] == 0
    assert set(ends[:-1]) == {2}
    assert len(ends) > 4
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("pm-llm: error:")]
    assert len(errors) == len(ends) - 1
    for error in errors:
        assert "No space left on device" in error or "write" in error, error
        assert "run the same command again" in error, error
    same_outcome(tmp_path / "run", whole["llama"])


def test_permission_lost(forker, whole, pico_folders, tmp_path) -> None:
    """As a user who may not write any more (root may write anywhere)."""
    run = tmp_path / "run"
    argv = [*arguments(pico_folders["llama"]), "--output_dir", str(run)]
    length = forker(*argv).seconds
    for part in (0.5, 0.7, 0.8):
        shutil.rmtree(run, ignore_errors=True)
        forker(*argv, kill=part * length)
        if (run / "state.json").exists() and not (run / "results.json").exists():
            break
    code = (
        "import os, sys, torch, transformers, trl, pm_llm.sequence\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "from pm_llm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    model = Path(pico_folders["llama"])
    for path in (run, *run.parents, model, *model.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "HOME": "/tmp"},
    )
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in one_error(done.stderr)
    assert forker(*argv).status == 0
    same_outcome(run, whole["llama"])


def test_a_clock_set_back(forker, whole, pico_folders, tmp_path) -> None:
    """Files of a run that was stopped seem to come from the future, the newest ones from the past."""
    run = tmp_path / "run"
    argv = [*arguments(pico_folders["llama"]), "--output_dir", str(run)]
    length = forker(*argv).seconds
    shutil.rmtree(run)
    forker(*argv, kill=0.6 * length)
    for number, path in enumerate(sorted(run.rglob("*"), key=lambda p: p.lstat().st_mtime)):
        when = time.time() + 10**6 - 1000 * number
        os.utime(path, (when, when), follow_symlinks=False)
    assert forker(*argv).status == 0
    same_outcome(run, whole["llama"])


def test_a_second_process(forker, whole, pico_folders, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    argv = [*arguments(pico_folders["llama"]), "--output_dir", str(run)]
    shutil.copytree(whole["llama"], run, symlinks=True)
    code = (
        "import sys; from pathlib import Path; from pm_llm.system.lock import Lock\n"
        f"lock = Lock(Path({str(run)!r})); lock.acquire(); print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "locked\n"
    ended = forker(*argv)
    assert ended.status == 2
    assert f"is in use by process {holder.pid} on " in one_error(ended.said)
    assert main(["status", str(run)]) == 0
    assert f"at work: process {holder.pid} on " in capsys.readouterr().out
    assert main(["report", str(run)]) == 2
    holder.kill()
    holder.wait()
    assert (run / ".lock").read_text().startswith(f"process {holder.pid} on ")  # what a dead process leaves
    assert Lock(run).holder() is None
    assert forker(*argv).status == 0


def test_what_may_change_when_a_run_goes_on(forker, pico_folders, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    model = pico_folders["llama"]

    def call(*more: str, **keys: object) -> tuple[int, str]:
        ended = forker(*arguments(model, **keys), "--output_dir", run, *more)
        return ended.status, ended.said

    assert call(order="sentiment,topic")[0] == 0
    first = (run / "stages/01-sentiment/adapter/adapter_model.safetensors").read_bytes()
    # settings of what has run: shown and refused, and nothing is touched
    state = (run / "state.json").read_bytes()
    status, said = call(order="sentiment,topic", **{"train.learning_rate": 0.02, "lora.r": 2})
    assert status == 2
    error = one_error(said)
    assert "train.learning_rate: 0.01 -> 0.02" in error
    assert "lora.r: 4 -> 2" in error
    assert "--restart-from" in error
    assert "its tasks" in one_error(call(order="topic,sentiment")[1])
    assert (run / "state.json").read_bytes() == state
    # which rows finished tasks have is settled: they are kept
    assert call(order="sentiment,topic", max_train_samples=16)[0] == 0
    status, said = call(order="sentiment,topic", max_test_samples=3)
    assert (status, "max_test_samples 4 -> 3 acts on tasks that follow" in said) == (0, True)
    assert json.loads((run / "results.json").read_text())["test_rows"] == [4, 4]
    # tasks that follow, and how often checkpoints are written, are no change
    assert call(order="sentiment,topic,question", **{"train.save_steps": 3})[0] == 0
    results = json.loads((run / "results.json").read_text())
    assert results["stages"] == ["sentiment", "topic", "question"]
    assert (run / "stages/01-sentiment/adapter/adapter_model.safetensors").read_bytes() == first
    # a restart keeps what is before, and may train otherwise
    status, said = call("--restart-from", "topic", **{"train.learning_rate": 0.02})
    assert status == 0, said
    assert (run / "stages/01-sentiment/adapter/adapter_model.safetensors").read_bytes() == first
    results = json.loads((run / "results.json").read_text())
    assert results["stage_settings"] == [["train.learning_rate: 0.02 -> 0.01"], [], []]
    assert "lora.r" in one_error(call("--restart-from", "topic", **{"lora.r": 2})[1])
    for wrong, expected in (("nothing", "is no task of this run"), ("4", "is no task of this run")):
        assert expected in one_error(call("--restart-from", wrong)[1])
    assert "holds no run that could be restarted" in one_error(
        forker(*arguments(model), "--output_dir", tmp_path / "other", "--restart-from", "1").said
    )
    assert not (tmp_path / "other").exists()
    # a restart from the first task is a new run
    status, said = call("--restart-from", "1", **{"lora.r": 2})
    assert status == 0, said
    every_adapter_loads(run)
    assert len(json.loads((run / "results.json").read_text())["stages"]) == 3


def test_a_restart_that_was_not_reached(forker, pico_folders, tmp_path) -> None:
    run = tmp_path / "run"
    argv = [*arguments(pico_folders["llama"], order="sentiment,topic"), "--output_dir", run]
    assert forker(*argv).status == 0
    more = [*arguments(pico_folders["llama"], order="sentiment,topic,question,puzzle"), "--output_dir", run]
    assert "only 2 of 4 tasks are trained" in one_error(forker(*more, "--restart-from", "puzzle").said)


def test_a_restart_that_is_stopped_goes_on(forker, pico_folders, tmp_path) -> None:
    """The same command, with --restart-from, does not throw away what was redone; when it is done, it begins anew."""
    run = tmp_path / "run"
    keys = {"train.max_steps": 40, "train.save_steps": 5}
    argv = [*arguments(pico_folders["llama"], order="sentiment,topic", **keys), "--output_dir", run]
    assert forker(*argv).status == 0
    again = [*argv, "--restart-from", "topic"]
    length = forker(*again).seconds
    seen, checkpoint = False, "work/02-topic/checkpoint-*"
    for when in ({"kill": 0.3 * length}, {"kill": 0.5 * length}, {"kill": 60.0, "when": str(run / checkpoint)}):
        ended = forker(*again, **when)
        assert "topic: going on from" not in ended.said  # nothing is left of the training before
        stopped = bool(list(run.glob(checkpoint)))
        done = forker(*again)
        assert done.status == 0
        assert ("topic: going on from" in done.said) == stopped
        seen = seen or stopped
    assert seen


def test_a_restart_with_other_settings_that_is_stopped_at_once_goes_on(pico_folders, tmp_path, monkeypatch) -> None:
    argv = [*arguments(pico_folders["llama"], order="sentiment,topic"), "--output_dir", str(tmp_path / "run")]
    assert main([*map(str, argv)]) == 0
    again = [*map(str, argv), "--restart-from", "topic", "--train.learning_rate", "0.007"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # after the stages are taken back, before anything else

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "go_on", stop)
        assert main(again) != 0
    assert main(again) == 0
    assert json.loads((tmp_path / "run/state.json").read_text())["restarted"] is None


def test_checkpoints_are_as_frequent_as_is_asked_for_now(forker, pico_folders, tmp_path) -> None:
    """Also in the task that is in training, whose checkpoint remembers another interval."""
    run, folder = tmp_path / "run", "work/01-sentiment/checkpoint-"
    keys = {"train.max_steps": 60, "train.save_steps": 5}
    argv = [*arguments(pico_folders["llama"], order="sentiment", **keys), "--output_dir", run]
    assert forker(*argv, kill=60.0, when=str(run / f"{folder}*")).status != 0
    ended = forker(*argv, "--train.save_steps", "1", kill=60.0, when=str(run / f"{folder}*[1-46-9]"))
    assert "going on from" in ended.said
    assert ended.status != 0  # it was killed, for there was one


def test_results_of_fewer_tasks_are_not_the_runs(forker, pico_folders, tmp_path, capsys) -> None:
    run, keys = tmp_path / "run", {"train.max_steps": 30, "train.save_steps": 5}
    assert forker(*arguments(pico_folders["llama"], order="sentiment", **keys), "--output_dir", run).status == 0
    more = [*arguments(pico_folders["llama"], order="sentiment,topic", **keys), "--output_dir", run]
    shutil.copytree(run, tmp_path / "before", symlinks=True)
    seen = set()
    for part in ("work/02-topic/checkpoint-*", "stages/02-topic"):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "before", run, symlinks=True)
        forker(*more, kill=60.0, when=str(run / part))
        state = json.loads((run / "state.json").read_text())
        if state["tasks"] == ["sentiment", "topic"] and "results.json" not in state["files"]:
            seen.add(part)
            assert main(["status", str(run)]) == 0
            assert "it is finished" not in capsys.readouterr().out
            assert main(["report", str(run)]) == 2
            assert "the run is not finished" in capsys.readouterr().err
    assert seen


def test_what_a_copy_or_another_program_leaves(forker, whole, pico_folders, tmp_path) -> None:
    """A link that became a folder, strange files beside ours: they are not in the way."""
    run = tmp_path / "run"
    shutil.copytree(whole["llama"], run)  # follows the link
    assert (run / "adapter").is_dir()
    assert not (run / "adapter").is_symlink()
    (run / "stages/.DS_Store").write_text("x")
    (run / "work").mkdir()
    (run / "work/x").write_text("x")
    ended = forker(*arguments(pico_folders["llama"]), "--output_dir", run)
    assert ended.status == 0, ended.said
    assert (run / "adapter").is_symlink()
    same_outcome(run, whole["llama"])


def test_a_lock_in_its_own_process(tmp_path) -> None:
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.acquire()
    assert other.holder() == one.holder()
    assert one.holder().startswith(f"process {os.getpid()} on ")
    with pytest.raises(PmLlmError, match="in use by this process"):
        other.acquire()
    code = f"from pathlib import Path; from pm_llm.system.lock import Lock; Lock(Path({str(tmp_path)!r})).acquire()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is in use by process" in done.stderr
    one.release()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_other_optimizers_and_recomputed_activations_go_on_too(forker, pico_folders, tmp_path) -> None:
    keys = {"train.optim": "adafactor", "train.gradient_checkpointing": "true", "dtype": "bfloat16"}
    keys |= {"train.lr_scheduler_type": "cosine", "lora.lora_dropout": 0.1, "train.gradient_accumulation_steps": 2}
    argv = arguments(pico_folders["llama"], **keys)
    length = forker(*argv, "--output_dir", tmp_path / "whole").seconds
    for part in (0.3, 0.6):
        forker(*argv, "--output_dir", tmp_path / "run", kill=part * length)
    ended = forker(*argv, "--output_dir", tmp_path / "run")
    assert ended.status == 0, ended.said
    same_outcome(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("disk"), PmLlmError),
        (torch.OutOfMemoryError("all"), None),
        (torch.AcceleratorError("assert", 1), None),
        (torch.distributed.DistError("a peer is gone"), None),
    ],
)
def test_what_a_device_says_is_not_taken_for_the_disk(error, told, tmp_path) -> None:
    with pytest.raises(told or type(error)), writing(tmp_path):
        raise error
