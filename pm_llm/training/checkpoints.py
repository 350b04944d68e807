"""The Trainer's checkpoints within a task: written whole, checked before they are gone on from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from pm_llm.system.files import damaged, digests, remove_tree, rename_tree, sha256_of, writing
from pm_llm.system.processes import process_state

MANIFEST = "manifest.json"
STAGING = ".staging"


class Checkpoints:
    """The checkpoints of one stage, `checkpoint-STEP/`; only the newest is kept.

    One holds what the Trainer and the constraints write, and a manifest of it, written last. It is written in another
    folder and renamed, so that a checkpoint is whole wherever there is one.

    Args:
        folder: Where they go. All processes must see it.
        key: What they belong to: a digest of configuration and rows. Those of another key are not used.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self.staging = folder / STAGING
        self.seconds = 0.0  # of training before this process began
        self._since = time.monotonic()

    def newest(self) -> str | None:
        """The newest whole checkpoint; every process gets the main one's answer. Also removes the others."""
        found: list[Any] = [None, 0.0]
        if process_state().is_main_process:
            found = list(self._newest())
        if process_state().num_processes > 1:
            broadcast_object_list(found)
        self.seconds = found[1]
        result: str | None = found[0]
        return result

    def _newest(self) -> tuple[str | None, float]:
        folders = {}
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            name, _, number = path.name.partition("-")
            if name == "checkpoint" and number.isdigit():
                folders[int(number)] = path
            elif path.is_dir():  # begun and never finished
                shutil.rmtree(path)
        best: tuple[str | None, float] = (None, 0.0)
        for step in sorted(folders, reverse=True):  # by step, not by the clock, which may have been set back
            manifest = self._manifest(folders[step]) if best[0] is None else None
            if manifest is None:
                remove_tree(folders[step])
            else:
                best = str(folders[step]), manifest["seconds"]
        return best

    def _manifest(self, folder: Path) -> dict[str, Any] | None:
        """None if the checkpoint is of other settings or not as it was written: then it counts as not there."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            expected = {**manifest, "digest": None}
            good = manifest["digest"] == sha256_of(expected) and manifest["key"] == self.key
            return manifest if good and not damaged(folder, manifest["files"]) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Within the block, every process writes below the folder given; after it, that is `checkpoint-STEP`.

        Raises:
            PmLlmError: If something could not be written.
        """
        state = process_state()
        with writing(self.folder, leftover=self.staging if state.is_main_process else None):
            if state.is_main_process:
                self.staging.mkdir(parents=True, exist_ok=True)
            state.wait_for_everyone()
            yield self.staging
            state.wait_for_everyone()
            if state.is_main_process:
                self._commit(self.staging / f"checkpoint-{step}")
            state.wait_for_everyone()

    def _commit(self, written: Path) -> None:
        final = self.folder / written.name
        manifest = {"key": self.key, "seconds": self.elapsed(), "files": digests(written), "digest": None}
        manifest["digest"] = sha256_of(manifest)
        (written / MANIFEST).write_text(json.dumps(manifest))
        if final.exists():  # a step is written again where training was stopped right at it
            remove_tree(final)
        rename_tree(written, final)
        for other in self.folder.glob("checkpoint-*"):
            if other != final:
                remove_tree(other)

    def elapsed(self) -> float:
        """Seconds of training so far, those of earlier processes included."""
        return self.seconds + time.monotonic() - self._since
