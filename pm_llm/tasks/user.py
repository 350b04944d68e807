"""The user's own tasks: JSONL, JSON, CSV or Parquet files, folders of them, saved datasets or Hub dataset ids."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from pm_llm.config import build
from pm_llm.errors import PmLlmError
from pm_llm.system.coerce import name_of
from pm_llm.tasks.base import DEFAULT_SCORER, Example, Task, check_while, picked
from pm_llm.tasks.columns import examples_of
from pm_llm.tasks.files import READERS, Row, dataset_rows, kind_of, read_rows, stem_of
from pm_llm.tasks.hub import load_hub_dataset
from pm_llm.tasks.problems import Problems
from pm_llm.tasks.store import Again, gathered, identity_of, once

_TEST_ALIASES = ("validation", "dev", "eval")
_SHARD = re.compile(r"-\d+-of-(\d+)(-[0-9a-f]+)?$")
Splits = dict[str, Callable[[Problems], Iterable[Row]]]  # read only where they are used


@dataclass(frozen=True)
class UserTask:
    """One entry of `tasks`: a path or dataset id, and what is not to be guessed.

    `data` is a file or several (with `test_data`, or a share `test_size` split off), a folder with `train.*` and
    `test.*`, a folder written by `Dataset.save_to_disk`, or a dataset id on the Hub (with its configuration in
    `subset`; with `stream` its rows are read as they come). `prompt` and `completion` name the columns; `prompt` may
    be several, which are joined, or a template such as `{question}\\n{choices}`. `messages` names a chat column,
    whose last turn is the answer, and `text` one of raw text, all of which is learnt; `chosen` and `rejected` are the
    answers of preference pairs. Without names, common ones are found (prompt/completion, instruction/output,
    question/answer, text/label, messages ...), and every other column with text must be in `ignore`. `special_tokens`
    says what the text of a special token in a row is: `text` or `token`. Of a chat all turns of the `assistant` are
    learnt, but for those with `weight` 0, or with `loss_on: last` the last one alone. `labels` makes it a
    classification task: every other answer is an error. `validation_size` splits a share off the training rows, for
    choosing settings without the test rows.
    """

    data: str | list[str]
    name: str | None = None
    test_data: str | None = None
    validation_data: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    validation_split: str = "validation"
    prompt: str | list[str] | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    ignore: list[str] = field(default_factory=list)
    id: str = "id"
    special_tokens: str | None = None
    loss_on: str = "assistant"
    labels: list[Any] = field(default_factory=list)
    scorer: str | None = None
    test_size: float = 0.1
    validation_size: float = 0.0
    seed: int = 0
    stream: bool = False

    @property
    def first(self) -> str:
        """Where its rows are; of several files the first."""
        return self.data if isinstance(self.data, str) else self.data[0]


def load_user_tasks(
    entries: Sequence[Any], folder: Path | None, problems: Problems, probe: bool = False
) -> list[Task]:
    """The tasks named by `entries` (strings or mappings); relative paths are looked up in `folder`, if given.

    With `probe`, a file's rows are all test rows, and rows of training are not needed.

    A folder without a `train.*` file (and no saved dataset) is a folder of tasks: one a file or subfolder, by name.
    One that holds nothing but splits is a task.
    """
    specs = user_tasks(entries, folder)
    return [_load(spec, folder, probe, problems) for spec in specs]


def user_tasks(entries: Sequence[Any], folder: Path | None, kept: Sequence[Task] = ()) -> list[UserTask]:
    """What `entries` name; the files and folders of `kept` tasks may be gone."""
    return [_parse(one) for entry in entries for one in _expand(entry, folder, kept)]


def load_user_task(spec: UserTask, folder: Path | None, problems: Problems) -> Task:
    """One of them, read and checked."""
    return _load(spec, folder, False, problems)


def rows_or_prompts(entries: Any, folder: Path | None, problems: Problems) -> list[Task]:
    """Files or datasets given as `tasks` are, one entry or a list, all of their rows as training rows; of those that
    are prompts alone, or are chats that end with a question, the answer is empty."""
    listed = entries if isinstance(entries, list) else [entries]
    specs = [_parse(one) for entry in listed for one in _expand(entry, folder)]
    return [_load(spec, folder, True, problems, prompts=True) for spec in specs]


def _expand(entry: Any, folder: Path | None, kept: Sequence[Task] = ()) -> list[Any]:
    path = _place(entry, folder) if isinstance(entry, str) else None
    gone = [Path(t.source) for t in kept if path is not None and Path(t.source).parent == path.absolute()]
    if path is None or not (path.is_dir() or gone) or _is_saved(path):
        return [entry]
    children = sorted(
        child
        for child in {*gone, *(path.absolute().iterdir() if path.is_dir() else ())}
        if child in gone or (not child.name.startswith(".") and (child.is_dir() or kind_of(child) is not None))
    )
    if gone:
        return [str(child) for child in children]
    splits = {_split_of(child) for child in children}
    alone = splits <= {"test", *_TEST_ALIASES} and all(child.is_file() for child in children)
    if not children or "train" in splits or alone:
        return [entry]
    return [str(child.absolute()) for child in children]


def _place(name: str, folder: Path | None) -> Path:
    return Path(name) if folder is None else folder / name  # an absolute name stays as it is


def _split_of(file: Path) -> str:
    """`train` for train.jsonl, and for train-00000-of-00002.parquet, as the Hub's datasets are laid out."""
    return _SHARD.sub("", stem_of(file))


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _parse(entry: Any) -> UserTask:
    if isinstance(entry, str):
        return UserTask(entry)
    if not isinstance(entry, dict) or "data" not in entry:
        raise PmLlmError(f"tasks: {entry!r} is not a task. Give a path, a dataset id, or a mapping with `data`.")
    spec: UserTask = build(UserTask, entry, "")
    if not spec.data:
        raise PmLlmError(f"tasks: {entry!r} has no data. Give a path, several, or a dataset id.")
    for label in spec.labels:
        if not isinstance(label, str):
            raise PmLlmError(f"labels: {label!r} is no text. Quote it: YAML takes yes, no and 1 for something else.")
    if spec.special_tokens not in (None, "text", "token"):
        raise PmLlmError(f"special_tokens is {spec.special_tokens!r}; it must be text or token.")
    if spec.loss_on not in ("assistant", "last"):
        raise PmLlmError(f"loss_on is {spec.loss_on!r}; it must be assistant (all of its turns) or last.")
    for key, fine in (("test_size", 0 < spec.test_size < 1), ("validation_size", 0 <= spec.validation_size < 1)):
        if not fine:
            given = getattr(spec, key)
            raise PmLlmError(f"task {spec.name or spec.data}: {key} is {given:g}. Give a share between 0 and 1.")
    files = [file for file in (spec.test_data, spec.validation_data) if file is not None]
    one_split = files and spec.test_split == spec.validation_split
    if one_split or len(files) > len(set(files)):
        key, value = ("split", spec.test_split) if one_split else ("data", spec.test_data)
        both = f"test_{key} and validation_{key} are both {value!r}"
        raise PmLlmError(f"task {spec.name or spec.data}: {both}. Give each its own rows.")
    return spec


def task_name(spec: UserTask, folder: Path | None) -> str:
    """Its own, or that of its file or folder."""
    path = _place(spec.first, folder)
    found = path.name if kind_of(path) is None else stem_of(path) if isinstance(spec.data, str) else _split_of(path)
    return name_of(spec.name or found, f"the name of {spec.data!r}")


def _load(spec: UserTask, folder: Path | None, probe: bool, problems: Problems, prompts: bool = False) -> Task:
    """A task, read and checked; a large one is read once as long as its files stay as they are."""
    path, name = _place(spec.first, folder), task_name(spec, folder)
    here = path.is_dir() or kind_of(path) is not None or path.is_file() or spec.first.startswith((".", "/"))
    if here and spec.subset is not None:
        raise PmLlmError(f"task {name!r}: subset {spec.subset!r} is of a dataset on the Hub, and {path} is here.")
    paths = [_place(one, folder) for one in ([spec.data] if isinstance(spec.data, str) else spec.data)]
    if path.is_dir() and len(paths) == 1:
        splits = _from_folder(path, spec)
    elif here:
        splits = {spec.train_split: partial(_read_all, paths)}
        if probe:
            splits[spec.test_split] = splits[spec.train_split]
    else:
        splits = _from_datasets(load_hub_dataset(spec.first, spec.subset, spec.stream), spec.first)
    default = {f.name: f.default for f in fields(UserTask)}
    given = (("test_split", spec.test_data), ("validation_split", spec.validation_data))
    for key, file in given:
        split = getattr(spec, key)
        if split == spec.train_split and not probe and (file is not None or split != default[key]):
            both = f"{key} and train_split are both {split!r}"
            raise PmLlmError(f"task {name!r}: {both}. Score rows that are not trained on (or give them as a probe).")
        if file is not None:
            splits[split] = partial(_read_all, [_place(file, folder)])
    others = [_place(file, folder) for _, file in given if file is not None]
    source = str(path.absolute()) if here else spec.first
    identity = identity_of([*paths, *others] if here else others, splits)
    whole = None if identity is None else [name, asdict(spec), source, identity, probe, prompts, problems.drop]
    return once(whole, problems, partial(_assembled, spec, name, splits, source, probe, prompts=prompts), not prompts)


def task_in_memory(name: str, given: dict[str, Any], keys: dict[str, Any]) -> Task:
    """A task of datasets or rows by split, see :meth:`pm_llm.tasks.base.Task.from_dataset`."""
    problems = Problems(drop=keys.pop("bad_rows", "error") == "drop")
    spec = _parse({"data": name, "name": name, **keys})
    places = {"train": spec.train_split, "test": spec.test_split, "validation": spec.validation_split}

    def read(rows: Any, place: str, problems: Problems) -> Iterable[Row]:
        if isinstance(rows, (list, tuple)):
            return (Row(dict(row), f"{place}:row {number}") for number, row in enumerate(rows, start=1))
        return dataset_rows(rows, place)

    splits: Splits = {
        places[key]: partial(read, rows, f"{name}/{key}") for key, rows in given.items() if rows is not None
    }
    found = check_while(problems, partial(_assembled, spec, name, splits, "", False, prompts=False))
    problems.tell()
    return found


def _assembled(
    spec: UserTask, name: str, splits: Splits, source: str, probe: bool, problems: Problems, prompts: bool
) -> Task:
    """The task of some splits."""
    default = {f.name: f.default for f in fields(UserTask)}
    # no rows are scored that are trained on
    scores = set(splits) - (set() if probe else {spec.train_split})
    scored, validated = _scored(spec, scores)
    if probe and scored is not None:
        splits = {spec.train_split: splits[scored]} | splits
    for key in ("train_split", "test_split", "validation_split"):
        split = getattr(spec, key)
        # a split that was asked for must be there; the usual ones may be missing, but the training rows
        if split not in splits and (key == "train_split" or split != default[key]):
            problems.add("", f"task {name!r} has no split {split!r}; it has {', '.join(splits)}. Name it with {key}.")
            return Task(name, [], [], spec.scorer or DEFAULT_SCORER["prompt"])

    @cache  # a probe's rows are those of both splits
    def examples(load: Callable[[Problems], Iterable[Row]]) -> Sequence[Example]:
        rows = Again(lambda first: load(problems if first else Problems()))
        return gathered(examples_of(rows, spec, problems, prompts), name)

    train = examples(splits[spec.train_split])
    test = None if scored is None else examples(splits[scored])
    validation = None if validated is None or probe else examples(splits[validated])
    if test is None:
        what = f"task {name!r} has no test split and test_size"
        train, test = _split_off(train, spec.test_size, spec.seed, what, problems)
    if spec.validation_size and validation is None:
        what = f"task {name!r}: validation_size"
        train, validation = _split_off(train, spec.validation_size, spec.seed + 1, what, problems)
    return Task(
        name,
        train,
        test,
        spec.scorer or DEFAULT_SCORER[next((row.kind for row in train[:1]), "prompt")],
        tuple(spec.labels),
        validation or [],
        special_tokens=spec.special_tokens,
        loss_on=spec.loss_on,
        source=source,
    )


def _scored(spec: UserTask, splits: set[str]) -> tuple[str | None, str | None]:
    """Which of `splits` are the test and the validation rows, if any are.

    Where there is no test split another stands in for it, and is not the validation split then; but not rows that were
    given for validation alone.
    """
    validation = spec.validation_split if spec.validation_split in splits else None
    own = spec.validation_data is not None
    stand_ins = [split for split in (spec.validation_split, *_TEST_ALIASES) if not own or split != validation]
    scored = next((split for split in (spec.test_split, *stand_ins) if split in splits), None)
    if not own and (scored != spec.test_split or scored == validation):
        validation = None
    return scored, validation


def _split_off(
    rows: Sequence[Example], share: float, seed: int, what: str, problems: Problems
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The rows without, and only, a share of them drawn by `seed`."""
    from datasets import Dataset

    if not rows:
        return [], []
    try:
        halves = Dataset.from_dict({"at": list(range(len(rows)))}).train_test_split(test_size=share, seed=seed)
    except ValueError as error:
        problems.add("", f"{what}={share} of {len(rows)} row(s) with seed {seed} cannot make one: {error}.")
        return rows, []
    return picked(rows, halves["train"]["at"]), picked(rows, halves["test"]["at"])


def _from_folder(path: Path, spec: UserTask) -> Splits:
    from datasets import load_from_disk
    from pyarrow import ArrowException

    if _is_saved(path):
        try:
            loaded = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
            raise PmLlmError(f"{path} cannot be read as a saved dataset: {error!r}") from error
        return _from_datasets(dict(loaded) if isinstance(loaded, dict) else {spec.train_split: loaded}, str(path))
    files = defaultdict(list)
    for file in sorted(path.iterdir()):
        if kind_of(file) is not None:
            files[_split_of(file)].append(file)
    splits: Splits = {split: partial(_joined, split, parts) for split, parts in files.items()}
    known = {spec.train_split, spec.test_split, spec.validation_split, "test", *_TEST_ALIASES}
    for inner in sorted(x for x in path.iterdir() if x.is_dir() and x.name in known):
        parts = sorted(file for file in inner.iterdir() if kind_of(file) is not None)
        if inner.name in splits:
            raise PmLlmError(f"{path}: the folder {inner.name} and {files[inner.name][0].name} are both that split.")
        if parts:
            splits[inner.name] = partial(_read_all, parts)
    if not splits:
        raise PmLlmError(f"{path} holds no {', '.join(READERS)} file and no saved dataset.")
    return splits


def _joined(split: str, files: list[Path], problems: Problems) -> Iterator[Row]:
    of = {int(found[1]) if (found := _SHARD.search(stem_of(file))) else 1 for file in files}
    folder = files[0].parent
    if len(of) > 1 or len({file.suffix for file in files}) > 1 or len(files) > max(of):
        names = " and ".join(file.name for file in files)
        raise PmLlmError(
            f"{folder}: {names} are all of the split {split!r}. Keep one, give them as a list (`data: [a, b]`), or "
            f"put them into a folder {split}."
        )
    if len(files) < max(of):
        raise PmLlmError(f"{folder} holds {len(files)} of the {max(of)} files of the split {split!r}.")
    yield from _read_all(files, problems)


def _read_all(files: Sequence[Path], problems: Problems) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file, problems)


def _from_datasets(loaded: dict[str, Any], name: str) -> Splits:
    return {split: partial(_listed, rows, f"{name}/{split}") for split, rows in loaded.items()}


def _listed(rows: Any, name: str, problems: Problems) -> Iterator[Row]:
    return dataset_rows(rows, name)
