"""Tasks from files."""

from __future__ import annotations

import json

from pm_llm.config import RunConfig
from pm_llm.tasks.loading import load_tasks


def write(folder, category: str, name: str, labels: list[str], rows: list[dict]) -> None:
    place = folder / category / name
    place.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (place / f"{split}.json").write_text(json.dumps(rows))
    (place / "labels.json").write_text(json.dumps(labels))


def user_tasks(*entries, **options):
    return load_tasks(RunConfig(tasks=list(entries), **options))
