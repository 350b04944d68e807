"""The user's own tasks: JSONL, JSON, CSV or Parquet files, folders of them, saved datasets or Hub dataset ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.tasks import Example, Task

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEST_ALIASES = ("validation", "dev", "eval")


@dataclass(frozen=True)
class UserTask:
    """One entry of `tasks`: a path or dataset id, and what is not to be guessed.

    `data` is a file (with `test_data`, or a share `test_size` split off), a folder with `train.*` and `test.*`, a
    folder written by `Dataset.save_to_disk`, or a dataset id on the Hub (with its configuration in `subset`).
    `prompt` and `completion` name the columns; `messages` names a chat column, whose last turn is the answer.
    """

    data: str
    name: str | None = None
    test_data: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    scorer: str = "exact_match"
    test_size: float = 0.1
    seed: int = 0


def load_user_tasks(entries: Sequence[Any], folder: Path | None) -> list[Task]:
    """The tasks named by `entries` (strings or mappings); relative paths are looked up in `folder`, if given.

    A folder without a `train.*` file (and no saved dataset) is a folder of tasks: one a file or subfolder, by name.
    """
    return [_load(_parse(one), folder) for entry in entries for one in _expand(entry, folder)]


def _expand(entry: Any, folder: Path | None) -> list[Any]:
    path = _place(entry, folder) if isinstance(entry, str) else None
    if path is None or not path.is_dir() or _is_saved(path):
        return [entry]
    children = sorted(child for child in path.iterdir() if child.is_dir() or child.suffix in _READERS)
    if not children or any(child.stem == "train" for child in children):
        return [entry]
    return [str(child.absolute()) for child in children]


def _place(name: str, folder: Path | None) -> Path:
    return Path(name) if folder is None else folder / name  # an absolute name stays as it is


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _parse(entry: Any) -> UserTask:
    if isinstance(entry, str):
        return UserTask(entry)
    allowed = {f.name for f in fields(UserTask)}
    if not isinstance(entry, dict) or "data" not in entry:
        raise PmLlmError(f"tasks: {entry!r} is not a task. Give a path, a dataset id, or a mapping with `data`.")
    for key in entry:
        if key not in allowed:
            raise unknown_name("key of a task:", key, allowed)
    for f in fields(UserTask):
        if entry.get(f.name) is not None and not isinstance(
            entry[f.name], type(f.default) if f.name in ("test_size", "seed") else str
        ):
            raise PmLlmError(f"tasks: {f.name} is {entry[f.name]!r}, which is no {f.type}.")
    return UserTask(**entry)


def _load(spec: UserTask, folder: Path | None) -> Task:
    path = _place(spec.data, folder)
    name = spec.name or (path.stem if path.suffix in _READERS else path.name)
    if path.exists():
        splits = _from_path(path, spec, folder)
    elif path.suffix in _READERS or spec.data.startswith((".", "/")):
        raise PmLlmError(f"task {name!r}: {path} does not exist.")
    else:
        splits = _from_hub(spec, name)
    train = _split(splits, spec.train_split, (), name)
    if not len(train):
        raise PmLlmError(f"task {name!r} has no train rows. Check {spec.data} and its split {spec.train_split!r}.")
    test = _split(splits, spec.test_split, _TEST_ALIASES, name, optional=True)
    if test is None:
        if not 0 < spec.test_size < 1 or len(train) < 2:
            raise PmLlmError(f"task {name!r} has no test split and test_size={spec.test_size} cannot make one.")
        halves = train.train_test_split(test_size=spec.test_size, seed=spec.seed)
        train, test = halves["train"], halves["test"]
    return Task(name, _examples(train, spec, name), _examples(test, spec, name), spec.scorer)


def _from_path(path: Path, spec: UserTask, folder: Path | None) -> dict[str, Any]:
    from datasets import load_from_disk

    if path.is_file():
        splits = {spec.train_split: _read(path)}
        if spec.test_data is not None:
            splits[spec.test_split] = _read(_place(spec.test_data, folder))
        return splits
    if _is_saved(path):
        loaded = load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, dict) else {spec.train_split: loaded}
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _READERS}
    if not files:
        raise PmLlmError(f"{path} holds no {', '.join(_READERS)} file and no saved dataset.")
    return {split: _read(file) for split, file in files.items()}


def _read(path: Path) -> Any:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    if path.suffix not in _READERS:
        raise PmLlmError(f"{path}: files of kind {path.suffix!r} cannot be read. Allowed: {', '.join(_READERS)}.")
    if not path.is_file():
        raise PmLlmError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        return Dataset.from_dict({})
    # to pandas the words None and NA would be missing values; here they are labels
    options = {"keep_default_na": False} if path.suffix == ".csv" else {}
    try:
        return getattr(Dataset, f"from_{_READERS[path.suffix]}")(str(path), **options)
    except (DatasetGenerationError, ValueError, ArrowException) as error:
        if "no data" in str(error):
            return Dataset.from_dict({})
        raise PmLlmError(f"{path} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error


def _from_hub(spec: UserTask, name: str) -> dict[str, Any]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return dict(load_dataset(spec.data, spec.subset))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise PmLlmError(
            f"task {name!r}: {spec.data!r} is neither a file here nor a dataset to be had: {error}"
        ) from error


def _split(splits: dict[str, Any], wanted: str, aliases: Sequence[str], task: str, optional: bool = False) -> Any:
    for split in (wanted, *aliases):
        if split in splits:
            return splits[split]
    if optional:
        return None
    raise PmLlmError(f"task {task!r} has no split {wanted!r}; it has {', '.join(splits)}. Name it with `train_split`.")


def _examples(rows: Any, spec: UserTask, task: str) -> list[Example]:
    columns = rows.column_names
    if not len(rows):
        return []
    if spec.prompt in columns and spec.completion in columns:
        return [Example(str(row[spec.prompt]), _text(row[spec.completion])) for row in rows]
    if spec.messages in columns:
        return [_chat(row[spec.messages], task) for row in rows]
    raise PmLlmError(
        f"task {task!r} has columns {', '.join(columns)}; needed are {spec.prompt!r} and {spec.completion!r}, or "
        f"{spec.messages!r}. Name yours with `prompt`, `completion` or `messages`."
    )


def _chat(messages: Any, task: str) -> Example:
    if not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages or ()):
        raise PmLlmError(f"task {task!r}: each chat message needs `role` and `content`; one is {messages!r:.80}.")
    turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages or ()]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise PmLlmError(f"task {task!r}: a chat row must end with an assistant turn after at least one other.")
    return Example("", turns[-1]["content"], messages=tuple(turns[:-1]))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
