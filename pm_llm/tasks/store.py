"""Many rows lie in an Arrow file that is mapped into memory, and are read one by one; few are a list.

What was read and looked at once is found again by what it was made of, in the folder of caches of `datasets`
(`HF_DATASETS_CACHE`); whatever lies there may be deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from pm_llm.system.files import sha256_of
from pm_llm.system.progress import bar
from pm_llm.tasks.base import SPLITS, Example, Task, check_while
from pm_llm.tasks.problems import Problems

LIMIT = 20_000  # so many rows are held in memory
ROWS_AT_ONCE = 1000
_LISTS = ("messages", "alternatives", "tools")


def plain_of(row: Example) -> dict[str, Any]:
    """A row for JSON: what it says besides what every row says."""
    values = {f.name: (getattr(row, f.name), f.default) for f in dataclasses.fields(Example)}
    return {key: value for key, (value, default) in values.items() if value != default}


def example_of(plain: dict[str, Any]) -> Example:
    """The inverse of :func:`plain_of`, after JSON."""
    values: dict[str, Any] = {key: tuple(x) if key in _LISTS else x for key, x in plain.items()}
    return Example(**values)


class Stored(Sequence[Example]):
    """Rows in an Arrow file, or some of them in an order of their own.

    Args:
        file: The file, as :func:`gathered` wrote it.
        at: The numbers of its rows; by default all of them.
    """

    def __init__(self, file: Path, at: np.ndarray | None = None) -> None:
        from datasets import Dataset

        self.file, self.table = file, Dataset.from_file(str(file))
        self.at = np.arange(len(self.table)) if at is None else at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Stored: ...
    def __getitem__(self, i: int | slice) -> Example | Stored:
        if isinstance(i, slice):
            return Stored(self.file, self.at[i])
        return example_of(json.loads(self.table[int(self.at[i])]["row"]))

    def __iter__(self) -> Iterator[Example]:
        for at in range(0, len(self), ROWS_AT_ONCE):
            for row in self.table[self.at[at : at + ROWS_AT_ONCE]]["row"]:
                yield example_of(json.loads(row))

    def select(self, numbers: Sequence[int]) -> Stored:
        """Rows by their numbers."""
        return Stored(self.file, self.at[np.asarray(numbers, dtype=np.int64)])

    @property
    def key(self) -> str:
        """What stands for these rows in this order."""
        return hashlib.sha256(self.file.name.encode() + self.at.tobytes()).hexdigest()


def folder() -> Path:
    """Where these files lie."""
    from datasets import config

    found = Path(config.HF_DATASETS_CACHE) / "pm_llm"
    found.mkdir(parents=True, exist_ok=True)
    return found


USED: dict[str, set[Path]] = {}  # by task, the files here that hold its rows


def used(task: str, file: Path) -> Path:
    """The file, noted as one of a task's."""
    USED.setdefault(task, set()).add(file)
    return file


def forget(task: str) -> None:
    """Delete what lies here of a task; what is open can still be read."""
    for file in USED.pop(task, set()):
        file.unlink(missing_ok=True)


def written(name: str, rows: Iterable[dict[str, Any]], features: Any) -> Path:
    """An Arrow file of rows, under a name or, where that is empty, one of its content; whole, or not at all."""
    from datasets.arrow_writer import ArrowWriter

    digest = hashlib.sha256()
    with _scratch(f"{name or 'rows'}.arrow") as scratch:
        with ArrowWriter(path=str(scratch), features=features, writer_batch_size=ROWS_AT_ONCE) as writer:
            for row in rows:
                if not name:
                    digest.update(row["row"].encode() + b"\n")
                writer.write(row)
            writer.finalize()
        return scratch.replace(folder() / f"{name or digest.hexdigest()}.arrow")


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """A file of this process's own to write into, which is to get its name when it is whole: other processes may be
    writing the same."""
    scratch = folder() / f".{os.getpid()}-{name}"
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


@lru_cache
def code() -> str:
    """What stands for the programs that read rows and make tokens of them."""
    rooms = [Path(__file__).parent, Path(__file__).parent.parent / "families"]
    sources = [path.read_text(encoding="utf-8") for room in rooms for path in sorted(room.glob("*.py"))]
    return sha256_of([sources, version("transformers"), version("tokenizers"), version("jinja2")])


def gathered(rows: Iterable[Example], label: str = "rows") -> list[Example] | Stored:
    """Rows as a list, or, where there are more than `LIMIT`, in a file."""
    from datasets import Features, Value

    rest = iter(rows)
    few = list(islice(rest, LIMIT + 1))
    if len(few) <= LIMIT:
        return few

    def lines() -> Iterator[dict[str, str]]:
        with bar(None, f"read {label}", "row") as progress:
            for row in chain(few, rest):
                yield {"row": json.dumps(plain_of(row), ensure_ascii=False)}
                progress.update(1)

    return Stored(used(label, written("", lines(), Features({"row": Value("string")}))))


class Again:
    """Rows that are gone through several times: few are held, many are read anew.

    Args:
        read: Reads them. It is told whether it is the first time, as what is wrong with them is told once.
    """

    def __init__(self, read: Callable[[bool], Iterable[Any]]) -> None:
        self.read, self.first = read, True
        self.held: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.held is not None:
            yield from self.held
            return
        first, self.first = self.first, False
        held: list[Any] | None = []
        for row in self.read(first):
            if held is not None:
                held.append(row)
                held = held if len(held) <= LIMIT else None
            yield row
        self.held = held


def record_of(rows: Sequence[Example], task: str) -> dict[str, Any]:
    """Rows for JSON: where they lie, or what they say."""
    if not isinstance(rows, Stored):
        return {"rows": [plain_of(row) for row in rows]}
    file = folder() / f"{rows.key}.npy"
    if not file.is_file():
        with _scratch(file.name) as scratch:
            np.save(scratch, rows.at)
            scratch.replace(file)
    return {"file": used(task, rows.file).name, "at": used(task, file).name}


def rows_of(record: dict[str, Any], task: str) -> Sequence[Example]:
    """The inverse of :func:`record_of`. Raises OSError if a file is gone."""
    if "rows" in record:
        return [example_of(plain) for plain in record["rows"]]
    file, at = (used(task, folder() / record[key]) for key in ("file", "at"))
    return Stored(file, np.load(at))


def identity_of(paths: Sequence[Path], splits: Mapping[str, Any]) -> Any:
    """What rows are read from, as it is now: files with their sizes and times of change, datasets with their
    fingerprints. None where it cannot be told (a stream)."""
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    stats = [(str(f.absolute()), f.stat()) for f in files]
    found: list[Any] = [[name, x.st_size, x.st_mtime_ns, x.st_ctime_ns, x.st_ino] for name, x in stats]
    for split, read in splits.items():
        rows = next((x for x in getattr(read, "args", ()) if hasattr(x, "features")), None)
        if rows is not None:
            fingerprint = getattr(rows, "_fingerprint", None)
            if fingerprint is None:
                return None
            found.append([split, fingerprint])
    return found


def once(key: Any, problems: Problems, make: Callable[[Problems], Task], answers: bool) -> Task:
    """The task that `make` gives, checked; one whose rows lie in files is found again by its key."""
    made: list[Task] = []

    def record() -> dict[str, Any]:
        before = len(problems.found), dict(problems.notes), {k: set(x) for k, x in problems.dropped.items()}
        task = check_while(problems, make, answers)
        made.append(task)
        large = any(isinstance(getattr(task, split), Stored) for split in SPLITS)
        if not large or len(problems.found) > before[0]:
            return {}
        dropped = {file: sorted(places - before[2].get(file, set())) for file, places in problems.dropped.items()}
        return {
            "splits": {split: record_of(getattr(task, split), task.name) for split in SPLITS},
            "task": {k: getattr(task, k) for k in ("name", "scorer", "labels", "special_tokens", "loss_on", "source")},
            "files": task.files,
            "notes": [note for note in problems.notes if note not in before[1]],
            "dropped": dropped,
        }

    if key is None:
        return check_while(problems, make, answers)
    found = remembered(key, record, bool, key[0])
    if made:
        return made[0]
    try:
        splits: dict[str, Any] = {split: rows_of(one, key[0]) for split, one in found["splits"].items()}
    except OSError:  # somebody emptied the folder in part
        return check_while(problems, make, answers)
    for note in found["notes"]:
        problems.note(note)
    for places in found["dropped"].values():
        for place in places:
            problems.row(place, "")
    files = tuple(tuple(one) for one in found["files"])
    return Task(**{**found["task"], "labels": tuple(found["task"]["labels"])}, **splits, files=files)


def remembered(
    key: Any, make: Callable[[], dict[str, Any]], when: Callable[[dict[str, Any]], bool], task: str
) -> dict[str, Any]:
    """What `make` gives of a task, for JSON; kept under a key, and not made again, where `when` says so of it."""
    file = folder() / f"{sha256_of([code(), key])}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(used(task, file).read_text(encoding="utf-8"))
        return found
    found = make()
    if when(found):
        with _scratch(file.name) as scratch:
            scratch.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            scratch.replace(used(task, file))
    return found
