"""Old data may be gone (law 11): each task's folder vanishes right after its stage, and the run is killed."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from pm_llm.run.reading import Reading
from tests.conftest import FAMILIES
from tests.faults.conftest import KILLS, arguments, same_outcome
from tests.helpers.tasks import jsonl_tasks

TASKS = ("sentiment", "topic", "question", "puzzle")
METHODS = ("pm", "pm_curvature", "ewc", "coso", "replay")
# `make faults` has all of them
FEW = [("llama", "pm_curvature"), ("t5", "ewc")]
ALL = [(family, method) for family in FAMILIES for method in METHODS]


def finished(run: Path) -> list[str]:
    reading = Reading(run)
    return [stage.task for stage in reading.state()["stages"]] if reading.has_state() else []


@pytest.mark.parametrize(("family", "method"), FEW if KILLS <= 4 else ALL)
def test_each_task_vanishes_after_its_stage(family: str, method: str, forker, pico_folders, tmp_path) -> None:
    jsonl_tasks(tmp_path / "tasks", *TASKS)
    keys = {"tasks": "tasks", "method": method, "train.max_steps": 3, "max_rank": 12}
    plain = list(arguments(pico_folders[family], **keys))
    for name in ("benchmark", "order"):
        at = plain.index(f"--{name}")
        del plain[at : at + 2]
    ended = forker(*plain, "--output_dir", "whole", cwd=tmp_path)
    assert ended.status == 0, ended.said
    rng, length = random.Random(f"{family} {method}"), ended.seconds
    kills, status = 0, None
    while status != 0:
        instant = rng.uniform(0.2, 0.6) * length if kills < 4 else None
        ended = forker(*plain, "--output_dir", "run", cwd=tmp_path, kill=instant)
        status = ended.status
        assert status in (0, -signal.SIGKILL), ended.said
        kills += status != 0
        for name in finished(tmp_path / "run"):
            shutil.rmtree(tmp_path / "tasks" / name, ignore_errors=True)
    assert kills
    same_outcome(tmp_path / "run", tmp_path / "whole")
