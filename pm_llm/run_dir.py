"""The run's folder. The only place that knows its layout on disk.

    config.yaml            the whole configuration
    state.json             the finished stages with scores and coefficients, and library versions
    stages/01-agnews/      adapter/ (merged, standard PEFT), task_adapter/ (as trained), predictions.jsonl, log.jsonl
    curvature.safetensors  in the last stage's folder only: what the merge rule remembers
    adapter -> stages/..   the merged adapter after the last finished task, at a stable path
    untrained.jsonl        predictions before the first task, where they were asked for
    results.json, matrix.png, report.html, README.md

A stage is written under a temporary name and renamed when whole; then `state.json` is replaced, then the link.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError

ADAPTER, TASK_ADAPTER, CURVATURE = "adapter", "task_adapter", "curvature.safetensors"
PREDICTIONS, UNTRAINED = "predictions.jsonl", "untrained.jsonl"


class RunDir:
    """One run's folder.

    Args:
        path: The folder; made by :meth:`create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # ---- making and opening ----
    def create(self, config: RunConfig, tasks: list[str], versions: dict[str, str]) -> None:
        """Make the folder for a run, or open it to go on.

        Raises:
            PmLlmError: If the folder holds a run with another configuration (the differences are shown), holds
                something else, or cannot be written.
        """
        plain = config.plain()
        del plain["output_dir"]
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        try:
            if (self.path / "state.json").is_file():
                finished = self.state()["stages"]
                if finished:  # a run that never finished a task may be begun anew with another configuration
                    self._check_same(plain, tasks)
                self._sweep()
                if finished:
                    return
            elif self._holds_something():
                raise PmLlmError(f"{self.path} is not empty and holds no run. Choose another output_dir.")
            (self.path / "stages").mkdir(parents=True, exist_ok=True)
            # the state comes first: from then on the folder is known as a run's
            self.write_state({"tasks": tasks, "stages": [], "versions": versions})
            self._write_text("config.yaml", text)
        except OSError as error:
            raise PmLlmError(f"cannot write to {self.path}: {error.strerror}. Choose another output_dir.") from error

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises PmLlmError if there is none."""
        if not (Path(path) / "state.json").is_file():
            raise PmLlmError(f"{path} is not a run folder: state.json is missing.")
        return cls(path)

    def _holds_something(self) -> bool:
        """Whether there is more than a start leaves that was killed before it wrote its state."""
        if not self.path.exists():
            return False
        names = {p.name for p in self.path.iterdir()}
        stages = self.path / "stages"
        return bool(names - {"stages", ".state.json.tmp"}) or (stages.is_dir() and any(stages.iterdir()))

    def _check_same(self, plain: dict[str, Any], tasks: list[str]) -> None:
        old, new = _flat({**self.config(), "its tasks": self.state()["tasks"]}), _flat({**plain, "its tasks": tasks})
        differences = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)
        ]
        if differences:
            raise PmLlmError(
                f"{self.path} holds a run with another configuration ({'; '.join(differences)}). "
                "Choose another output_dir, or delete the folder."
            )

    def _sweep(self) -> None:
        """Remove what a killed process left half-done: stages that no state file knows."""
        known = {stage["folder"] for stage in self.state()["stages"]}
        for folder in (self.path / "stages").iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)
        if known:
            self._link(self.state()["stages"][-1]["folder"])

    # ---- reading ----
    def config(self) -> dict[str, Any]:
        """The configuration the run was made with."""
        return yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))

    def state(self) -> dict[str, Any]:
        """`tasks`, `stages` (each with folder, task, scores, merge) and `versions`."""
        return self._json("state.json", {"tasks", "stages", "versions"})

    def results(self) -> dict[str, Any]:
        """`results.json`. Raises PmLlmError if the run is not finished."""
        path = self.path / "results.json"
        if not path.is_file():
            raise PmLlmError(f"{self.path} has no results.json: the run is not finished. Run the same command again.")
        return self._json(
            path.name, {"config", "tasks", "stages", "matrix", "untrained", "lower_is_better", "seconds"}
        )

    def _json(self, name: str, keys: set[str]) -> dict[str, Any]:
        """A JSON file of the run. Raises PmLlmError if it is damaged, or lacks what this version writes."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PmLlmError(f"{self.path / name} cannot be read ({error}). Run the same command again.") from error
        if not isinstance(found, dict) or not keys <= found.keys():
            raise PmLlmError(f"{self.path / name} is not what this version of pm_llm writes. Run in another folder.")
        return found

    @property
    def adapter(self) -> Path:
        """The merged adapter after the last finished task. Raises PmLlmError if no task is finished."""
        if not (self.path / ADAPTER).is_dir():
            raise PmLlmError(f"{self.path} holds no adapter yet: no task is finished.")
        return self.path / ADAPTER

    def curvature(self) -> dict[str, Tensor]:
        """What the merge rule remembers (empty if nothing)."""
        stages = self.state()["stages"]
        file = self.path / "stages" / stages[-1]["folder"] / CURVATURE
        return load_file(file) if file.is_file() else {}

    def predictions(self, stage: int) -> Path:
        """The predictions after stage `stage` (from 0), or -1 for those of the untrained model."""
        if stage < 0:
            return self.path / UNTRAINED
        return self.path / "stages" / self.state()["stages"][stage]["folder"] / PREDICTIONS

    def log(self, stage: int) -> list[dict[str, Any]]:
        """The training log of stage `stage` (from 0)."""
        text = (self.path / "stages" / self.state()["stages"][stage]["folder"] / "log.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    # ---- writing ----
    def note_untrained(self, scores: dict[str, float], predictions: list[dict[str, Any]]) -> None:
        """Keep what the model scored before the first task."""
        write_jsonl(self.path / UNTRAINED, predictions)
        self.write_state({**self.state(), "untrained": scores})

    def new_stage(self, number: int, task: str) -> Path:
        """A temporary folder for stage `number` (from 1), to be filled and then committed."""
        folder = self.path / "stages" / f".{number:02d}-{_safe(task)}.tmp"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def commit(self, folder: Path, entry: dict[str, Any], curvature: dict[str, Tensor]) -> None:
        """Make a filled stage folder part of the run: rename, then state, then link; then drop old curvature."""
        if curvature:
            save_file(curvature, folder / CURVATURE)
        name = folder.name.removeprefix(".").removesuffix(".tmp")
        folder.rename(folder.parent / name)
        state = self.state()
        before = [stage["folder"] for stage in state["stages"]]
        state["stages"].append({"folder": name, **entry})
        self.write_state(state)
        self._link(name)
        for old in before:
            (self.path / "stages" / old / CURVATURE).unlink(missing_ok=True)

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace `state.json`."""
        self._write_text("state.json", json.dumps(state, indent=1))

    def write_results(self, results: dict[str, Any]) -> None:
        """Replace `results.json`."""
        self._write_text("results.json", json.dumps(results, indent=1))

    def _write_text(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def _link(self, stage: str) -> None:
        temporary = self.path / f".{ADAPTER}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("stages") / stage / ADAPTER, target_is_directory=True)
        temporary.replace(self.path / ADAPTER)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line a row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
