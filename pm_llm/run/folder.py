"""The run's folder. The only place that knows its layout on disk.

    state.json             the one file that says what is done: configuration, finished stages, scores, and the
                           manifest (size and SHA-256 of every other file); it holds its own digest
    config.yaml            the configuration, for people
    stages/01-agnews/      adapter/ (merged, standard PEFT), task_adapter/ (as trained), log.jsonl, predictions/
    curvature.safetensors  in the last stage's folder only: what the merge rule remembers
    memory.safetensors     in a stage's folder: what the constraints remember, where they do
    adapter -> stages/..   the merged adapter after the last trained task, at a stable path
    untrained/             predictions before the first task, where they were asked for
    work/                  the Trainer's checkpoints of the task in training
    results.json, matrix.png, report.html, README.md

Files are written under a temporary name, flushed and renamed; then `state.json` is replaced. What it does not list is
not part of the run, whatever a crash has left, and is swept away.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.run.record import Results, StageRecord
from pm_llm.system.files import (
    damaged,
    digests,
    remove_tree,
    rename_tree,
    replace_bytes,
    replace_link,
    sha256_of,
    writing,
)
from pm_llm.system.lock import Lock

ADAPTER, TASK_ADAPTER, CURVATURE, LOG = "adapter", "task_adapter", "curvature.safetensors", "log.jsonl"
MEMORY = "memory.safetensors"
STATE, RESULTS, STAGES, UNTRAINED, WORK = "state.json", "results.json", "stages", "untrained", "work"
SUMS = "sums"  # in work: a Fisher's sums in mapped files
OWN = (STATE, RESULTS, ADAPTER, UNTRAINED, WORK, "config.yaml", "matrix.png", "report.html", "README.md", "figures")
OURS = re.compile(r"\d{2,}-.*|\.\d{2,}-.*\.tmp")  # folders that a run makes in stages and work
FORMAT = 3  # of the folder; 1 had none written, 2 did not say what was true of the method
KEYS = {"tasks", "config", "rows", "stages", "untrained", "files", "restarted"}


class RunDir:
    """One run's folder.

    Args:
        path: The folder; made by :meth:`begin`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = Lock(self.path)

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises PmLlmError if there is none."""
        run = cls(path)
        run.check_links()
        if not run.has_state():
            hint = " Its stages are there: put state.json back from a copy." if run._stages_on_disk() else ""
            raise PmLlmError(f"{path} is not a run folder: state.json is missing.{hint}")
        return run

    def has_state(self) -> bool:
        """Whether the folder holds a run. Raises PmLlmError if something else stands in its state's place."""
        state = self.path / STATE
        if os.path.lexists(state) and (state.is_symlink() or not state.is_file()):
            raise PmLlmError(
                f"{state} is no ordinary file. Put state.json itself there, or choose another output_dir."
            )
        return state.is_file()

    def check_links(self) -> None:
        """Raise PmLlmError if a folder of the run is a link: what lies behind one is somebody's, and is not swept."""
        stages = self.path / STAGES
        inside = sorted(stages.iterdir()) if stages.is_dir() and not stages.is_symlink() else []
        for folder in (stages, self.path / UNTRAINED, self.path / WORK, *inside):
            if folder.is_symlink():
                raise PmLlmError(
                    f"{folder} is a link, and a run removes what is left over in its folders. Let output_dir itself "
                    "lie on (or be a link to) the other disk."
                )

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

    # ---- beginning and going on; the caller has the lock ----
    def begin(self, state: dict[str, Any]) -> None:
        """Make the folder a run's that has done nothing yet."""
        with writing(self.path):
            self._write_state({**state, "stages": [], "untrained": None, "files": {}})  # from here it is a run folder
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
        folders = {stage.folder for stage in state["stages"][number:]}
        files = {
            name: known
            for name, known in state["files"].items()
            if _is_kept(name) and not (name.startswith(f"{STAGES}/") and name.split("/")[1] in folders)
        }
        with writing(self.path):
            stages = state["stages"][:number]
            self._write_state({**state, "config": config, "stages": stages, "files": files, "restarted": token})
            self._clear_work()
            self.sweep()

    def _holds_something(self) -> bool:
        """Whether there is more than a start leaves that was killed before it wrote its state."""
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        return bool(names - {STAGES, ".lock", f".{STATE}.tmp"}) or self._stages_on_disk()

    def _stages_on_disk(self) -> bool:
        return (self.path / STAGES).is_dir() and any((self.path / STAGES).iterdir())

    def sweep(self) -> None:
        """Remove what a killed process left half-done, and let `adapter` point to the last stage's."""
        state = self.state()
        stages = [stage.folder for stage in state["stages"]]
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
            if folder.name not in stages and OURS.fullmatch(folder.name):
                _remove(folder)
        if RESULTS not in state["files"]:
            _remove(self.path / RESULTS)
        for folder in [*(self.path / STAGES / name for name in stages), self.path / UNTRAINED]:
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

    # ---- reading ----
    def state(self) -> dict[str, Any]:
        """`tasks`, `config`, `rows`, `stages`, `untrained`, `files`. Raises PmLlmError if the file is damaged."""
        found = self._json(STATE)
        first = "digest" not in found and {"tasks", "stages", "versions"} <= found.keys()
        if first or (isinstance(found.get("format"), int) and found["format"] < FORMAT):
            raise PmLlmError(
                f"{self.path} holds a run of an older pm_llm, which this one neither goes on with nor reads. Run in "
                f"another folder. The adapters in {self.path / STAGES} are ordinary PEFT adapters still."
            )
        if isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise PmLlmError(
                f"{self.path} is of format {found['format']}, of a newer pm_llm; this one knows up to {FORMAT}. "
                "Upgrade pm_llm, or run in another folder."
            )
        digest = found.pop("digest", None)
        try:
            good = digest == sha256_of(found) and found.keys() >= KEYS
            found["stages"] = [StageRecord.of(stage) for stage in found["stages"]]
            good = good and all(map(_is_inside, _names(found)))
        except (KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise PmLlmError(
                f"{self.path / STATE} has other content than was written. Put it back from a copy, or run in another "
                f"folder. The adapters in {self.path / STAGES} are ordinary PEFT adapters still."
            )
        return found

    def results(self) -> Results:
        """`results.json`. Raises PmLlmError if the run is not finished, or the file is damaged."""
        if RESULTS not in self.state()["files"]:
            raise PmLlmError(f"{self.path} has no results.json: the run is not finished. Run the same command again.")
        self.check([RESULTS])
        return Results.of(self._json(RESULTS))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            again = "Run the same command again." if name == RESULTS else "Put it back from a copy."
            raise PmLlmError(f"{self.path / name} cannot be read ({error}). {again}") from error
        if not isinstance(found, dict):
            raise PmLlmError(f"{self.path / name} is not what this version of pm_llm writes. Run in another folder.")
        return found

    def damaged(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
        """What is wrong with the manifest's files, by their path in the folder."""
        state = self.state()
        found = damaged(self.path, {name: x for name, x in state["files"].items() if wanted(name)})
        if found:  # a run that goes on may have replaced them meanwhile
            listed = self.state()["files"]
            found = {name: x for name, x in found.items() if listed.get(name) == state["files"].get(name)}
        return found

    def link_missed(self) -> str | None:
        """Where the link `adapter` should point to and does not, as when a run was killed just before; else None."""
        stages = self.state()["stages"]
        if not stages:
            return None
        target, link = Path(STAGES) / stages[-1].folder / ADAPTER, self.path / ADAPTER
        return None if link.is_symlink() and link.readlink() == target else target.as_posix()

    def check(self, names: Sequence[str]) -> None:
        """Compare files, or all of some folders (names that end in a slash), with the manifest.

        Raises:
            PmLlmError: If one is damaged: which, how, and what to do.
        """
        folders = tuple(name for name in names if name.endswith("/"))
        found = self.damaged(lambda name: name in names or name.startswith(folders))
        if found:
            shown = "; ".join(f"{self.path / name} {what}" for name, what in list(found.items())[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise PmLlmError(f"the run's folder was damaged: {shown}{more}. {self.remedy(found)}")

    def remedy(self, found: dict[str, str]) -> str:
        """What to do about damaged files."""
        state = self.state()
        folders = [stage.folder for stage in state["stages"]]
        stages = [folders.index(name.split("/")[1]) for name in found if name.startswith(f"{STAGES}/")]
        if any(name.startswith(f"{UNTRAINED}/") for name in found):
            stages.append(0)
        if stages:
            return (
                "Put it back from a copy, or run the same command with "
                f"--restart-from {min(stages) + 1} (task {state['stages'][min(stages)].task!r})."
                if folders
                else "Put it back from a copy, or run in another folder."
            )
        pages = [name for name in found if name not in (RESULTS, "config.yaml", "matrix.png")]
        return "Make it again with pm-llm report or pm-llm push." if pages else "Run the same command again."

    @classmethod
    def check_within(cls, path: str | Path) -> None:
        """If a folder is part of a run, check it. Raises PmLlmError if the run's manifest knows it otherwise."""
        folder = Path(path).resolve()
        for above in folder.parents[:3]:
            if (above / STATE).is_file() and (above / STAGES).is_dir():  # or it is some other program's
                cls(above).check([f"{folder.relative_to(above).as_posix()}/"])
                return

    @property
    def adapter(self) -> Path:
        """The merged adapter after the last trained task. Raises PmLlmError if there is none, or it is damaged."""
        state = self.state()
        stages = state["stages"]
        if not stages:
            raise PmLlmError(f"{self.path} holds no adapter yet: no task is finished.")
        folder = f"{STAGES}/{stages[-1].folder}/{ADAPTER}"
        self.check([f"{folder}/"])
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if f"{folder}/{name}" not in state["files"] or (self.path / folder / name).is_symlink():
                raise PmLlmError(f"{self.path / folder / name} is not as the run wrote it. Put it back from a copy.")
        return self.path / folder

    def stage_adapter(self, stage: int, which: str = ADAPTER) -> Path:
        """An adapter of stage `stage` (from 0): merged, or as trained (`task_adapter`)."""
        found: Path = self.path / STAGES / self.state()["stages"][stage].folder / which
        return found

    def curvature(self) -> dict[str, Tensor] | None:
        """What the merge rule remembers after the last stage; None where it is not on disk."""
        state = self.state()
        name = f"{STAGES}/{state['stages'][-1].folder}/{CURVATURE}"
        return load_file(self.path / name) if name in state["files"] else None

    def memories(self, stage: int, count: int) -> list[dict[str, Tensor]]:
        """What each of `count` constraints remembers after stage `stage` (from 0)."""
        state = self.state()
        name = f"{STAGES}/{state['stages'][stage].folder}/{MEMORY}"
        found = load_file(self.path / name) if name in state["files"] else {}
        memories: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for key, tensor in found.items():
            place, _, rest = key.partition(".")
            memories[int(place)][rest] = tensor
        return memories

    def predictions(self, stage: int) -> list[Path]:
        """The files of predictions after stage `stage` (from 0), or -1 for those of the untrained model.

        Raises:
            PmLlmError: If one is damaged.
        """
        state = self.state()
        names = (state["untrained"] or {}) if stage < 0 else state["stages"][stage].scores
        files = [entry["predictions"] for entry in names.values()]
        if files:
            self.check(files)
        return [self.path / name for name in files]

    def log(self, stage: int) -> list[dict[str, Any]]:
        """The training log of stage `stage` (from 0). Raises PmLlmError if it is damaged."""
        name = f"{STAGES}/{self.state()['stages'][stage].folder}/{LOG}"
        self.check([name])
        return [json.loads(line) for line in (self.path / name).read_text("utf-8").split("\n") if line]

    def work(self, number: int, task: str) -> Path:
        """The folder for the Trainer's checkpoints of stage `number` (from 1); it may not exist."""
        return self.path / WORK / _folder(number, task)

    # ---- writing; the caller has the lock ----
    def commit_stage(
        self, number: int, record: StageRecord, fill: Callable[[Path], None], curvature: dict[str, Tensor]
    ) -> None:
        """Make stage `number` (from 1) part of the run: its folder as `fill` fills it, then state, then the link."""
        name = _folder(number, record.task)
        temporary, folder = self.path / STAGES / f".{name}.tmp", self.path / STAGES / name
        with writing(self.path, leftover=temporary):
            _remove(temporary)
            temporary.mkdir()
            fill(temporary)
            if curvature:
                save_file(curvature, temporary / CURVATURE)
            rename_tree(temporary, folder)
            state = self.state()
            old = [file for file in state["files"] if file.endswith(f"/{CURVATURE}")]
            record.folder, record.remembers = name, bool(curvature)
            state["stages"].append(record)
            state["files"] = {k: x for k, x in state["files"].items() if k not in old}
            state["files"] |= digests(self.path, [path for path in folder.rglob("*") if path.is_file()])
            self._write_state(state)
            replace_link(self.path / ADAPTER, Path(STAGES) / name / ADAPTER)
            for file in old:
                (self.path / file).unlink(missing_ok=True)
            _remove(self.work(number, record.task))

    def commit_score(
        self, stage: int, task: str, score: float, lines: list[dict[str, Any]], seconds: float, peak_memory: int
    ) -> None:
        """Keep what stage `stage` (from 0; -1: the untrained model) answers on a task, its score, and what it took."""
        state = self.state()
        scores = (state["untrained"] or {}) if stage < 0 else state["stages"][stage].scores
        above = Path(UNTRAINED) if stage < 0 else Path(STAGES) / state["stages"][stage].folder / "predictions"
        name = (above / f"{_folder(len(scores) + 1, task)}.jsonl").as_posix()
        with writing(self.path):
            (self.path / above).mkdir(exist_ok=True)
            replace_bytes(self.path / name, jsonl(lines))
            scores[task] = {"score": score, "predictions": name}
            if stage < 0:
                state["untrained"] = scores
            else:
                record: StageRecord = state["stages"][stage]
                record.seconds["evaluate"] += seconds
                most = record.peak_memory_bytes.get("evaluate", 0)
                record.peak_memory_bytes["evaluate"] = max(peak_memory, most)
            state["files"] |= digests(self.path, [self.path / name])
            self._write_state(state)

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
        self.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def _write_state(self, state: dict[str, Any]) -> None:
        stages = [stage.plain() for stage in state["stages"]]
        state = json.loads(json.dumps({**state, "stages": stages, "format": FORMAT}))  # as it will be read
        replace_bytes(self.path / STATE, json.dumps({**state, "digest": sha256_of(state)}, indent=1).encode())


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """A line a row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _folder(number: int, name: str) -> str:
    return f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}"


def _remove(path: Path) -> None:
    """A file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _is_kept(name: str) -> bool:
    """Whether a file is of what has run, and not made from it."""
    return name.startswith((f"{STAGES}/", f"{UNTRAINED}/")) or name == "config.yaml"


def _names(state: dict[str, Any]) -> list[str]:
    """All paths that a state names."""
    scores = [state["untrained"] or {}, *(stage.scores for stage in state["stages"])]
    predictions = [one["predictions"] for found in scores for one in found.values()]
    return [*state["files"], *(stage.folder for stage in state["stages"]), *predictions]


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder: a run may come from elsewhere."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path != PurePosixPath()
