"""The run's folder. The only place that knows its layout on disk.

    state.json             the one file that says what is done: configuration, finished stages, scores, and the
                           manifest (size and SHA-256 of every other file); it holds its own digest
    config.yaml            the configuration, for people
    stages/01-agnews/      adapter/ (merged, standard PEFT), task_adapter/ (as trained), log.jsonl, predictions/
    task.json, test_rows.jsonl   in a stage's folder: what is kept of the task, see kept.py
    curvature.safetensors  in the folders of the last stages (`keep_curvature`): what the merge rule remembers
    memory.safetensors     in a stage's folder: what the constraints remember, where they do
    adapter -> stages/..   the merged adapter after the last trained task, at a stable path
    origin/                what the run began with, where that was not the bare model: adapter/, curvature.safetensors,
                           memory.safetensors
    untrained/             predictions before the first task, where they were asked for
    work/                  the Trainer's checkpoints of the task in training
    results.json, matrix.png, report.html, README.md

Files are written under a temporary name, flushed and renamed; then `state.json` is replaced. What it does not list is
not part of the run, whatever a crash has left, and is swept away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.run.reading import (
    ADAPTER,
    CURVATURE,
    FORMAT,
    ORIGIN,
    OURS,
    OWN,
    RESULTS,
    STAGES,
    STATE,
    SUMS,
    TEST_ROWS,
    UNTRAINED,
    WORK,
    Reading,
    stage_folder,
)
from pm_llm.run.record import Results, StageRecord
from pm_llm.system.coerce import write_yaml
from pm_llm.system.files import (
    digests,
    jsonl,
    remove_tree,
    rename_tree,
    replace_bytes,
    replace_link,
    sha256_of,
    writing,
)


class RunDir(Reading):
    """One run's folder.

    Args:
        path: The folder; made by :meth:`begin`.
    """

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; a folder that was made for nothing is removed.

        Raises:
            PmLlmError: If another process is in, the folder cannot be written, or it holds something that is no run.
        """
        self.check_links()
        with writing(self.path):
            if not self.has_state() and self._holds_something():
                raise PmLlmError(
                    f"{self.path} is not empty and holds no run: {self.path / STATE} is missing. Put it back from a "
                    "copy, or choose another output_dir."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            yield
        finally:
            begun = os.path.lexists(self.path / STATE)
            self._lock.release(remove=not begun)
            if not begun and self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def holder(self) -> str | None:
        """The process that is at work here; None if there is none."""
        return self._lock.holder()

    def begin(self, state: dict[str, Any]) -> None:
        """Make the folder a run's that has done nothing yet."""
        with writing(self.path):
            empty: dict[str, Any] = {"origin": None, "stages": [], "undone": [], "untrained": None, "files": {}}
            self._write_state({**state, **empty})  # from here it is a run folder
            self._clear_work()
            self.sweep()
            self._record_config(state["config"])

    def go_on(self, config: dict[str, Any], rows: dict[str, Any], tasks: list[str]) -> None:
        """Take over what may have changed since (settings and rows of what has not run yet), and sweep."""
        old = self.state()
        state = {**old, "config": config, "rows": rows, "tasks": tasks}
        if state != old:  # results and pages are no longer this run's
            state["files"] = {name: known for name, known in old["files"].items() if _is_kept(name)}
        with writing(self.path):
            self._write_state(state)
            self.sweep()
            self._record_config(config)

    def restart(self, number: int, token: str, config: dict[str, Any]) -> None:
        """Forget stage `number` (from 0) and those after it. `token` stands for the command that wants it and `config`
        are its settings, so that the same command goes on if it is stopped here."""
        state = self.state()
        folders = {stage.folder for stage in (*state["stages"][number:], *state["undone"])}
        files = {
            name: known
            for name, known in state["files"].items()
            if _is_kept(name) and not (name.startswith(f"{STAGES}/") and name.split("/")[1] in folders)
        }
        with writing(self.path):
            stages = state["stages"][:number]
            changed = {"config": config, "stages": stages, "undone": [], "files": files, "restarted": token}
            self._write_state({**state, **changed})
            self._clear_work()
            self.sweep()

    def _holds_something(self) -> bool:
        """Whether there is more than a start leaves that was killed before it wrote its state."""
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        return bool(names - {STAGES, ".lock", f".{STATE}.tmp"}) or self._stages_on_disk()

    def sweep(self) -> None:
        """Remove what a killed process left half-done, and let `adapter` point to the last stage's."""
        state = self.state()
        stages = [stage.folder for stage in state["stages"]]
        known = [*stages, *(stage.folder for stage in state["undone"])]
        (self.path / STAGES).mkdir(exist_ok=True)
        if not (self.path / ADAPTER).is_symlink():  # what a copy may have made of the link
            _remove(self.path / ADAPTER)
        if stages:
            replace_link(self.path / ADAPTER, Path(STAGES) / stages[-1] / ADAPTER)
        else:
            (self.path / ADAPTER).unlink(missing_ok=True)
        for temporary in self.path.glob(".*.tmp"):
            if temporary.name[1:-4] in OWN or temporary.is_file():
                _remove(temporary)
        for folder in (self.path / STAGES).iterdir():
            if folder.name not in known and OURS.fullmatch(folder.name):
                _remove(folder)
        if RESULTS not in state["files"]:
            _remove(self.path / RESULTS)
        if state["origin"] is None:
            _remove(self.path / ORIGIN)
        for folder in [*(self.path / STAGES / name for name in known), self.path / ORIGIN, self.path / UNTRAINED]:
            for file in [path for path in folder.rglob("*") if path.is_file()]:
                if file.relative_to(self.path).as_posix() not in state["files"]:
                    file.unlink()
        self._clear_work(but=f"{len(stages) + 1:02d}-")

    def _clear_work(self, but: str | None = None) -> None:
        """Remove the checkpoints, except those of the stage whose folder begins with `but`; and nothing else."""
        work = self.path / WORK
        if not work.is_dir() or work.is_symlink():
            return
        for folder in work.iterdir():
            if (OURS.fullmatch(folder.name) or folder.name == SUMS) and not (but and folder.name.startswith(but)):
                _remove(folder)
        if but is None and not any(work.iterdir()):
            work.rmdir()

    def commit_origin(self, record: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Make what the run begins with part of it: its folder as `fill` fills it, then state."""
        temporary, folder = self.path / f".{ORIGIN}.tmp", self.path / ORIGIN
        with writing(self.path, leftover=temporary):
            _remove(temporary)
            temporary.mkdir()
            fill(temporary)
            rename_tree(temporary, folder)
            self.record([path for path in folder.rglob("*") if path.is_file()], origin=record)

    def commit_stage(
        self, number: int, record: StageRecord, fill: Callable[[Path], None], curvature: dict[str, Tensor]
    ) -> None:
        """Make stage `number` (from 1) part of the run: its folder as `fill` fills it, then state, then the link."""
        self._forget_undone()
        name = stage_folder(number, record.task)
        temporary, folder = self.path / STAGES / f".{name}.tmp", self.path / STAGES / name
        with writing(self.path, leftover=temporary):
            _remove(temporary)
            temporary.mkdir()
            fill(temporary)
            if curvature:
                save_file(curvature, temporary / CURVATURE)
            rename_tree(temporary, folder)
            state = self.state()
            record.folder, record.remembers = name, bool(curvature)
            state["stages"].append(record)
            recent = {stage.folder for stage in state["stages"][-record.config["keep_curvature"] :]}
            old = [f"{STAGES}/{stage.folder}/{CURVATURE}" for stage in state["stages"] if stage.folder not in recent]
            old = [file for file in old if file in state["files"]]
            state["files"] = {k: x for k, x in state["files"].items() if k not in old}
            state["files"] |= digests(self.path, [path for path in folder.rglob("*") if path.is_file()])
            self._write_state(state)
            replace_link(self.path / ADAPTER, Path(STAGES) / name / ADAPTER)
            for file in old:
                (self.path / file).unlink(missing_ok=True)
            _remove(self.work(number, record.task))

    def restore(self, count: int, rows: dict[str, Any]) -> None:
        """Let the first `count` finished stages be the run's, of those that are and those that are taken back; `rows`
        are the digests of theirs."""
        state = self.state()
        stages = [*state["stages"], *state["undone"]]
        names = [stage.task for stage in stages[:count]]
        config = {**state["config"], "order": names, "repeat": 1}
        changed = {
            "stages": stages[:count],
            "undone": stages[count:],
            "tasks": names,
            "rows": rows,
            "config": config,
            "files": {name: known for name, known in state["files"].items() if _is_kept(name)},
        }
        with writing(self.path):
            self._write_state({**state, **changed})
            self._clear_work()
            self.sweep()
            self._record_config(config)

    def _forget_undone(self) -> None:
        """Stages that were taken back give way to another."""
        state = self.state()
        folders = [stage.folder for stage in state["undone"]]
        if folders:
            gone = tuple(f"{STAGES}/{folder}/" for folder in folders)
            files = {name: known for name, known in state["files"].items() if not name.startswith(gone)}
            self._write_state({**state, "undone": [], "files": files})
            for folder in folders:
                _remove(self.path / STAGES / folder)

    def commit_score(
        self, stage: int, task: str, score: float, lines: list[dict[str, Any]] | None, seconds: float, peak_memory: int
    ) -> None:
        """Keep what stage `stage` (from 0; -1: the untrained model) answers on a task (None: nothing of that), its
        score, and what it took."""
        state = self.state()
        scores = (state["untrained"] or {}) if stage < 0 else state["stages"][stage].scores
        above = Path(UNTRAINED) if stage < 0 else Path(STAGES) / state["stages"][stage].folder / "predictions"
        name = (above / f"{stage_folder(len(scores) + 1, task)}.jsonl").as_posix()
        with writing(self.path):
            scores[task] = {"score": score, "predictions": None if lines is None else name}
            if lines is not None:
                (self.path / above).mkdir(exist_ok=True)
                replace_bytes(self.path / name, jsonl(lines))
                state["files"] |= digests(self.path, [self.path / name])
            if stage < 0:
                state["untrained"] = scores
            else:
                record: StageRecord = state["stages"][stage]
                record.seconds["evaluate"] += seconds
                most = record.peak_memory_bytes.get("evaluate", 0)
                record.peak_memory_bytes["evaluate"] = max(peak_memory, most)
            self._write_state(state)

    def forget_rows(self, stage: int) -> None:
        """Keep no test rows of the task of stage `stage` (from 0)."""
        name = f"{STAGES}/{self.state()['stages'][stage].folder}/{TEST_ROWS}"
        self.forget(lambda known: known == name)
        (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, content: str | bytes, **changes: Any) -> None:
        """Write a file of the run's folder and list it in the manifest, with `changes` of the state."""
        self.forget(lambda known: known == name)
        with writing(self.path):
            replace_bytes(self.path / name, content.encode() if isinstance(content, str) else content)
        self.record([self.path / name], **changes)

    def forget(self, replaced: Callable[[str], bool]) -> None:
        """Take files that are to be replaced out of the manifest: one that was replaced, and not yet listed again when
        the process was killed, is not damaged."""
        state = self.state()
        files = {name: known for name, known in state["files"].items() if not replaced(name)}
        if files != state["files"]:
            with writing(self.path):
                self._write_state({**state, "files": files})

    def record(self, files: Sequence[Path], **changes: Any) -> None:
        """List files that are whole in the manifest."""
        state = {**self.state(), **changes}
        with writing(self.path):
            state["files"] |= digests(self.path.absolute(), [path.absolute() for path in files])
            self._write_state(state)

    def write_results(self, results: Results) -> None:
        """Replace `results.json`; the run is finished."""
        self._clear_work()
        self.write(RESULTS, json.dumps(results.plain(), indent=1), restarted=None)

    def _record_config(self, config: dict[str, Any]) -> None:
        self.write("config.yaml", write_yaml(config))

    def _write_state(self, state: dict[str, Any]) -> None:
        records = {key: [stage.plain() for stage in state[key]] for key in ("stages", "undone")}
        state = json.loads(json.dumps({**state, **records, "format": FORMAT}))  # as it will be read
        replace_bytes(self.path / STATE, json.dumps({**state, "digest": sha256_of(state)}, indent=1).encode())


def _remove(path: Path) -> None:
    """A file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _is_kept(name: str) -> bool:
    """Whether a file is of what has run, and not made from it."""
    return name.startswith((f"{STAGES}/", f"{ORIGIN}/", f"{UNTRAINED}/")) or name == "config.yaml"
