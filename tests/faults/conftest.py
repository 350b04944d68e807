"""Real processes that are killed, and what must be true of a run's folder whenever that happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pm_llm.adapters import Adapter
from tests.conftest import FAMILIES, ROOT

# how many kills a family; `make faults` draws many
KILLS = int(os.environ.get("PM_LLM_KILLS", "4"))
TASKS = ("sentiment", "topic", "question")


@dataclass
class Ended:
    """How a command ended: its exit status (-9: killed), seconds, and what it printed."""

    status: int
    seconds: float
    said: str


class Forker:
    """Runs commands in forked processes; see `forker.py`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(
        self,
        *argv: object,
        kill: float | None = None,
        when: str = "",
        number: int = signal.SIGKILL,
        cwd: Path = ROOT,
    ) -> Ended:
        """Run `pm-llm ARGV`, and send a signal after `kill` seconds, or as soon as a path like `when` is there."""
        self.log.write_text("")
        job = {
            "argv": [str(word) for word in argv],
            "log": str(self.log),
            "cwd": str(cwd),
            "kill": kill,
            "when": when,
            "signal": int(number),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["status"], answer["seconds"], self.log.read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    found = Forker(tmp_path_factory.mktemp("forker"))
    yield found
    found.close()


def arguments(model: str, **more: object) -> list[str]:
    """A run of three tasks with several checkpoints in each, ending between epochs, on a pico model."""
    keys: dict[str, object] = {"model": model, "benchmark": "embedded", "order": ",".join(TASKS)}
    keys |= {"max_train_samples": 24, "max_test_samples": 4, "max_length": 96, "fisher.samples": 6}
    keys |= {"train.max_steps": 5, "train.learning_rate": 0.01, "train.logging_steps": 1, "lora.r": 4}
    keys |= {"train.per_device_train_batch_size": 8, "train.save_steps": 2, "max_rank": 6, **more}
    return ["run", *(str(word) for key, value in keys.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="session")
def whole(forker, pico_folders, tmp_path_factory) -> dict[str, Path]:
    """An uninterrupted run of each family."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp("whole") / family
        ended = forker(*arguments(pico_folders[family]), "--output_dir", found[family])
        assert ended.status == 0, ended.said
    return found


def same_outcome(run: Path, reference: Path) -> None:
    """Final adapter, matrix and coefficients are bit-identical."""
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, reference))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (run, reference))
    for key in (
        "matrix",
        "coefficients",
        "raw_coefficients",
        "module_coefficients",
        "truncation_errors",
        "curvatures",
    ):
        assert one[key] == other[key], key


def every_adapter_loads(run: Path) -> int:
    """Of all that a folder holds under their final names; their number."""
    found = [path.parent for path in run.rglob("adapter_config.json") if "/." not in path.as_posix()]
    found += [run / "adapter"] if (run / "adapter").exists() else []
    for folder in found:
        Adapter.load(folder)
    return len(found)
