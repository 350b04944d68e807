"""Runs under accelerate's launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pm_llm.adapters.adapter import Adapter
from tests.conftest import ROOT
from tests.helpers.forks import Ended, Forker


def launcher(kind: str, folder: Path, script: str | None = None, **changes: object) -> list[str]:
    """`accelerate launch` with the project's configuration, on two processes of this CPU; a run, or a script."""
    config = yaml.safe_load((ROOT / f"accelerate_configs/{kind}.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, **changes}
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / f"{kind}.yaml")]
    if "main_process_port" not in changes:
        launch += ["--main_process_port", "0"]
    return [*launch, str(ROOT / (script or "recipes/continual.py"))]


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def launch(forker: Forker, command: list[str], kill: float = 240.0) -> Ended:
    """The same launcher, where its ranks import nothing anew: for what is not about how processes start and end."""
    return forker(*command[3:], what="launch", kill=kill)


def rank(number: int, parent: int) -> int | None:
    """The process of a rank below a launcher."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and f"\0RANK={number}\0" in f"\0{(path / 'environ').read_text()}":
                return int(path.name)
        except (OSError, ValueError):  # it has ended
            continue
    return None


def same_as_one_process(run: Path, one: Path) -> None:
    """The matrix, and coefficients and adapters within float tolerance."""
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (run, one))
    ours, theirs = ([x if x is not None else -1.0 for row in found["matrix"] for x in row] for found in (a, b))
    exact = {"perplexity"}.isdisjoint(a["scorers"])
    assert ours == (theirs if exact else pytest.approx(theirs, rel=1e-3))
    assert a["raw_coefficients"] == pytest.approx(b["raw_coefficients"], rel=1e-3)
    for which in ("01-sentiment/task_adapter", "02-topic/task_adapter", "02-topic/adapter"):
        x, y = (Adapter.load(folder / "stages" / which).factors for folder in (run, one))
        for name in x:
            assert (x[name].dense() - y[name].dense()).norm() <= 1e-3 * y[name].dense().norm(), (which, name)
