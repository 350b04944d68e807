"""Reading a run's folder, and telling what in it is not as it was written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.run.record import Results, StageRecord
from pm_llm.system.files import (
    damaged,
    sha256_of,
)
from pm_llm.system.lock import Lock

ADAPTER, TASK_ADAPTER, CURVATURE, LOG = "adapter", "task_adapter", "curvature.safetensors", "log.jsonl"
MEMORY = "memory.safetensors"
ORIGIN, KEPT, TEST_ROWS = "origin", "task.json", "test_rows.jsonl"
STATE, RESULTS, STAGES, UNTRAINED, WORK = "state.json", "results.json", "stages", "untrained", "work"
SUMS = "sums"  # in work: a Fisher's sums in mapped files
OWN = (
    STATE,
    RESULTS,
    ADAPTER,
    ORIGIN,
    UNTRAINED,
    WORK,
    "config.yaml",
    "matrix.png",
    "report.html",
    "README.md",
    "figures",
)
OURS = re.compile(r"\d{2,}-.*|\.\d{2,}-.*\.tmp")  # folders that a run makes in stages and work
FORMAT = 4  # of the folder; 1 had none written, 2 did not say what was true of the method, 3 kept no test rows
KEYS = {"tasks", "config", "rows", "origin", "stages", "undone", "untrained", "files", "restarted"}

Found = TypeVar("Found", bound="Reading")


class Reading:
    """What can be known of a run from its folder. Raises PmLlmError where the folder holds no run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = Lock(self.path)

    @classmethod
    def open(cls: type[Found], path: str | Path) -> Found:
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
        for folder in (stages, self.path / ORIGIN, self.path / UNTRAINED, self.path / WORK, *inside):
            if folder.is_symlink():
                raise PmLlmError(
                    f"{folder} is a link, and a run removes what is left over in its folders. Let output_dir itself "
                    "lie on (or be a link to) the other disk."
                )

    def _stages_on_disk(self) -> bool:
        return (self.path / STAGES).is_dir() and any((self.path / STAGES).iterdir())

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
            for key in ("stages", "undone"):
                found[key] = [StageRecord.of(stage) for stage in found[key]]
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
        broken = [name.split("/")[1] for name in found if name.startswith(f"{STAGES}/")]
        stages = [folders.index(folder) for folder in broken if folder in folders]
        if len(stages) < len(broken) and not stages:
            return "It is of a task that was taken back; nothing else needs it."
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

    @property
    def origin(self) -> Path:
        """The adapter that the run began with, where it did not begin with the bare model."""
        return self.path / ORIGIN / ADAPTER

    def curvature(self, stage: int) -> dict[str, Tensor] | None:
        """What the merge rule remembers after stage `stage` (from 0; -1: of what the run began with); None where it is
        not on disk."""
        state = self.state()
        name = f"{_folder(state, stage)}/{CURVATURE}"
        return load_file(self.path / name) if name in state["files"] else None

    def memories(self, stage: int, count: int) -> list[dict[str, Tensor]]:
        """What each of `count` constraints remembers after stage `stage` (from 0; -1: of what the run began with)."""
        state = self.state()
        name = f"{_folder(state, stage)}/{MEMORY}"
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
        files = [entry["predictions"] for entry in names.values() if entry["predictions"]]
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
        return self.path / WORK / stage_folder(number, task)


def stage_folder(number: int, name: str) -> str:
    return f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}"


def _folder(state: dict[str, Any], stage: int) -> str:
    return ORIGIN if stage < 0 else f"{STAGES}/{state['stages'][stage].folder}"


def _names(state: dict[str, Any]) -> list[str]:
    """All paths that a state names."""
    stages = [*state["stages"], *state["undone"]]
    scores = [state["untrained"] or {}, *(stage.scores for stage in stages)]
    predictions = [one["predictions"] for found in scores for one in found.values() if one["predictions"]]
    return [*state["files"], *(stage.folder for stage in stages), *predictions]


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder: a run may come from elsewhere."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path != PurePosixPath()
