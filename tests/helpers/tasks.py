"""Tasks from files."""

from __future__ import annotations

import json
from pathlib import Path

from pm_llm.config import RunConfig
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.loading import load_tasks


def write(folder, category: str, name: str, labels: list[str], rows: list[dict]) -> None:
    place = folder / category / name
    place.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (place / f"{split}.json").write_text(json.dumps(rows))
    (place / "labels.json").write_text(json.dumps(labels))


def user_tasks(*entries, **options):
    return load_tasks(RunConfig(tasks=list(entries), **options))


def jsonl_tasks(folder: Path, *names: str, train: int = 24, test: int = 4) -> Path:
    """Embedded tasks as a folder each of JSONL files; returns `folder`."""
    for name in names:
        task = make_task(name, train, test)
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", task.train), ("test", task.test)):
            lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines))
    return folder
