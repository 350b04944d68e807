"""What a run keeps of a finished task, so that the files it came from may vanish.

`task.json` in a stage's folder has scorer, labels and the longest answer, and what was said of its training rows;
`test_rows.jsonl` the rows that it goes on being scored on. Nothing that follows opens the task's files again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pm_llm.config import RunConfig
from pm_llm.run.going_on import restart_token
from pm_llm.run.reading import CURVATURE, KEPT, STAGES, TEST_ROWS, Reading
from pm_llm.run.record import StageRecord
from pm_llm.system.files import jsonl
from pm_llm.system.progress import say
from pm_llm.tasks.base import Kept, Task
from pm_llm.tasks.store import example_of, plain_of


def write_kept(folder: Path, task: Task, answer: int, train: str, test: str) -> None:
    """Write both files into a stage's folder.

    Args:
        folder: The folder.
        task: The task that is committed.
        answer: Its longest answer in tokens.
        train: The digest of its training rows.
        test: That of its test rows.
    """
    found = {
        "name": task.name,
        "scorer": task.scorer,
        "labels": task.labels,
        "special_tokens": task.special_tokens,
        "loss_on": task.loss_on,
        "source": task.source,
        "files": task.files,
        "kept": dataclasses.asdict(Kept(answer, train, test, len(task.train), len(task.test), task.kind)),
    }
    (folder / KEPT).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    (folder / TEST_ROWS).write_bytes(jsonl([plain_of(row) for row in task.test]))


def read_kept(folder: Path) -> Task:
    """The task that :func:`write_kept` wrote, without training rows, and without test rows where none are kept."""
    found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    rows = (folder / TEST_ROWS).read_text(encoding="utf-8").split("\n") if (folder / TEST_ROWS).is_file() else []
    test = [example_of(json.loads(row)) for row in rows if row]
    found.setdefault("loss_on", "last")  # as it was before it could be said
    kept, labels, files = Kept(**found.pop("kept")), tuple(found.pop("labels")), found.pop("files")
    return Task(train=[], test=test, labels=labels, files=tuple(map(tuple, files)), kept=kept, **found)


def kept_tasks(run: Reading, config: RunConfig, restart_from: str | None = None) -> list[Task] | None:
    """The finished tasks of a run, a stage each; they need not be read from their files again.

    Empty where there are none, and for blurred boundaries, which mix rows of neighbours. None where their training
    rows are needed, as what the merge remembers has to be measured once more: after a restart further back than
    `keep_curvature`.

    Args:
        run: The run's folder; it may hold none.
        config: The configuration asked for.
        restart_from: The task that is redone, by name or number.
    """
    if not run.has_state() or config.blur:
        return []
    run.check_links()
    state = run.state()
    stages, names = state["stages"], state["tasks"]
    count = len(stages)
    if restart_from is not None:
        numbers = [i for i, name in enumerate(names) if restart_from in (name, str(i + 1))]
        begun = [i for i in numbers if state["restarted"] == restart_token(config, i)]  # it goes on
        count = count if begun else min([count, *numbers])
    if not count:
        return []
    if needs_rows(run, count):
        return None
    for key in ("max_train_samples", "max_test_samples", "bad_rows"):
        before, now = state["config"][key], getattr(config, key)
        if before != now:
            say(f"{key} {before} -> {now} acts on tasks that follow: of finished ones the run keeps its rows")
    return read_all(run, stages[:count])


def read_all(run: Reading, stages: Sequence[StageRecord]) -> list[Task]:
    """The tasks of some stages, as they are kept; files of theirs that have changed since are told."""
    found = []
    for record in stages:
        folder = f"{STAGES}/{record.folder}"
        run.check([f"{folder}/{KEPT}", f"{folder}/{TEST_ROWS}"])
        found.append(read_kept(run.path / folder))
    _tell_changed(found)
    return found


def needs_rows(run: Reading, count: int) -> bool:
    """Whether what the merge remembers after the first `count` stages is not in the run any more."""
    state = run.state()
    last = state["stages"][count - 1]
    return last.remembers and f"{STAGES}/{last.folder}/{CURVATURE}" not in state["files"]


def _tell_changed(tasks: Sequence[Task]) -> None:
    """Files that are there still, and are not as they were when they were read."""
    seen = {}
    for task in tasks:
        for path, size, time in task.files:
            there = Path(path)
            if there.is_file() and (there.stat().st_size, there.stat().st_mtime_ns) != (size, time):
                seen[path] = task.name
    for path, name in seen.items():
        say(f"{path} has changed since task {name!r} was trained on it; the run goes by what it has kept")
