"""Whether a model can be given the rows of tasks, and how they become tokens: each row is looked at before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.families import models
from pm_llm.families.base import Family, Row
from pm_llm.families.rows import TableRows, features_of
from pm_llm.system.files import sha256_of
from pm_llm.system.progress import bar
from pm_llm.tasks.base import SPLITS, Example, Task, picked
from pm_llm.tasks.encoding import Encoder, with_room
from pm_llm.tasks.problems import Problems
from pm_llm.tasks.store import Stored, code, folder, remembered, used, written

LEAVE_OUT = " Leave this skill out: name the others with general.skills."
Fitting = Callable[[Task], Task]
Key = tuple[str, Any]  # of a row: its task, and its place, or itself where it has none


def encoders_for(config: RunConfig, tasks: Iterable[Task]) -> tuple[dict[str, Encoder], Fitting]:
    """How each task's rows are rendered for `config.model`, by name, after a look at every row; and what takes the
    rows out of a task that cannot be (with `bad_rows: drop`, which says how many; else it leaves tasks as they are).

    Raises:
        PmLlmError: With every row whose frame alone is too long or that the chat template refuses.
    """
    tokenizer, model_family = models.load_tokenizer(config.model)
    problems, encoders = Problems(drop=config.bad_rows == "drop"), {}
    bad: dict[Key, Example] = {}  # held, so that none of them is another's
    tasks = list(tasks)
    context = models.context_of(config.model) if any(task.room for task in tasks) else None
    for task in tasks:
        blind = _blind(config, task, tokenizer, model_family, context)
        if task.kept is not None:  # its rows were looked at when it was trained
            encoders[task.name] = replace(blind, max_new_tokens=task.kept.answer)
            continue
        if task.outside is not None:
            encoders[task.name] = blind
            continue
        found = _looked_at(task, blind, config.max_new_tokens)
        if found["answer"]:
            encoders[task.name] = with_room(blind, found["answer"], task.name)
        for note in filter(None, found["notes"]):
            problems.note(note)
        for split, number, what in found["wrong"]:
            row = _splits(task)[split][number]
            bad[_key(task.name, row)] = row
            problems.row(row.place, what)
        for split in ("train", "test"):
            gone = {number for where, number, _ in found["wrong"] if where == split}
            if problems.drop and gone and len(gone) == len(getattr(task, split)):
                problems.add("", f"task {task.name!r} has no {split} rows left that the model can be given.")
    problems.tell()

    def fitting(task: Task) -> Task:
        def kept(some: Sequence[Example], name: str) -> Sequence[Example]:
            good = [i for i, row in enumerate(some) if _key(name, row) not in bad]
            return some if len(good) == len(some) else picked(some, good)

        splits: dict[str, Any] = {name: kept(getattr(task, name), task.name) for name in (*SPLITS, "whole")}
        return replace(task, **splits, foreign=tuple((name, kept(some, name)) for name, some in task.foreign))

    return encoders, fitting if bad else lambda task: task


def encoded(encoder: Encoder, rows: Sequence[Example], label: str) -> Sequence[Row]:
    """Training rows; of many rows in an Arrow file, which is made once."""
    if not isinstance(rows, Stored):
        return encoder.features(rows)
    from datasets import Dataset

    name = sha256_of(["rows", code(), rows.key, encoder.fingerprint])
    file = folder() / f"{name}.arrow"
    if not file.is_file():

        def tokens() -> Iterator[Row]:
            with bar(len(rows), f"encode {label}", "row") as progress:
                for row in rows:
                    yield from encoder.features([row])
                    progress.update(1)

        stream = tokens()
        first = next(stream)
        file = written(name, chain([first], stream), features_of(first))
    return TableRows(Dataset.from_file(str(used(label, file))))


def _blind(config: RunConfig, task: Task, tokenizer: Any, model_family: Family, context: int | None) -> Encoder:
    """How a task's rows are rendered, before anything is known of their answers; `context` is the model's own."""
    try:
        family = model_family.of(task.kind, config.train.beta)
    except PmLlmError as error:
        raise PmLlmError(f"task {task.name!r}: {error}" + (LEAVE_OUT if task.room else "")) from error
    length = config.max_length if task.room is None else min(task.room.max_length, context or task.room.max_length)
    return Encoder(tokenizer, family, length, 1, task.special_tokens, task.loss_on)


def _key(name: str, row: Example) -> Key:
    return name, row.place or id(row)


def _splits(task: Task) -> dict[str, Sequence[Example]]:
    """Its rows; of those that are trained also what neighbours may train on."""
    return {"train": task.whole or task.train, "validation": task.validation, "test": task.test}


def _looked_at(task: Task, blind: Encoder, most: int | None) -> dict[str, Any]:
    """Tokens of the longest answer (0: no row is good), what is wrong with which row of which split, and what to say
    of characters that the vocabulary lacks; kept for tasks of many rows."""
    splits = _splits(task)
    if not any(isinstance(rows, Stored) for rows in splits.values()):
        return _look(task, blind, most)
    keys = [rows.key if isinstance(rows, Stored) else repr(rows) for rows in splits.values()]
    return remembered(["look", keys, blind.fingerprint, most], lambda: _look(task, blind, most), bool, task.name)


def _look(task: Task, blind: Encoder, most: int | None) -> dict[str, Any]:
    splits = _splits(task)
    wrong: dict[tuple[str, int], str] = {}
    lengths: dict[tuple[str, int], int] = {}  # of whole prompts of chats that may be too long
    with bar(sum(map(len, splits.values())), f"look at {task.name}", "row") as progress:
        for split, rows in splits.items():
            for number, row in enumerate(rows):
                what, length = blind.look(row)
                if what is not None:
                    wrong[split, number] = what
                elif length > blind.max_length // 2:
                    lengths[split, number] = length
                progress.update(1)
    trained = splits["train"]
    good = (row for i, row in enumerate(trained) if ("train", i) not in wrong)
    if not len(trained) or all(("train", i) in wrong for i in range(len(trained))):
        return {"answer": 0, "notes": [], "wrong": [[*at, what] for at, what in wrong.items()]}
    answer = blind.family.answer_length(blind, good, most) if task.room is None else task.room.max_new_tokens
    encoder = with_room(blind, answer, task.name)
    wrong |= _too_long(encoder, splits, wrong, lengths) if task.room is None else _cut(encoder, task)
    found = [[*at, what] for at, what in wrong.items()]
    notes = [_unknown(task.name, encoder, splits, wrong), _shortened(task, encoder, trained, wrong, lengths)]
    return {"answer": answer, "notes": notes, "wrong": found}


def _too_long(
    encoder: Encoder,
    splits: dict[str, Sequence[Example]],
    wrong: dict[tuple[str, int], str],
    lengths: dict[tuple[str, int], int],
) -> dict[tuple[str, int], str]:
    """Rows whose prompt does not fit however much of it is cut. Of prompts in one frame it is the frame's matter; of
    chats only long ones are looked at again."""
    frames: dict[tuple[str, str], str | None] = {}
    found = {}
    few = encoder.prompt_budget < encoder.max_length // 2
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            at = (split, number)
            if at in wrong:
                continue
            if encoder.is_chat(row):
                long = few or lengths.get(at, 0) > encoder.prompt_budget
                what = encoder.too_long(row) if long else None
            else:
                frame = (row.head, row.tail)
                what = frames[frame] = frames[frame] if frame in frames else encoder.too_long(row)
            if what is not None:
                found[at] = what
    return found


def _cut(encoder: Encoder, task: Task) -> dict[tuple[str, int], str]:
    """Rows of which something would be cut, where nothing may be."""
    found = {}
    for number, row in enumerate(task.test if task.kind != "text" else ()):
        length = len(encoder.whole_prompt(row))
        if length > encoder.prompt_budget:
            found["test", number] = (
                f"{task.name}: a prompt of {length} tokens, and {encoder.prompt_budget} are taken.{LEAVE_OUT}"
            )
    return found


def _shortened(
    task: Task,
    encoder: Encoder,
    rows: Sequence[Example],
    wrong: dict[tuple[str, int], str],
    lengths: dict[tuple[str, int], int],
) -> str:
    """What to say of training prompts that are cut. A text has no more tokens than bytes, so short ones are not
    encoded; of chats the lengths are known."""
    if task.kind == "text" or task.room is not None:
        return ""
    most = encoder.prompt_budget

    def cut(at: tuple[str, int], row: Example) -> bool:
        if encoder.is_chat(row) and most >= encoder.max_length // 2:
            return lengths.get(at, 0) > most
        size = most + 1 if encoder.is_chat(row) else len((row.head + row.body + row.tail).encode()) + 2
        return size > most and len(encoder.whole_prompt(row)) > most

    number = sum(cut(("train", i), row) for i, row in enumerate(rows) if ("train", i) not in wrong)
    if not number:
        return ""
    return (
        f"task {task.name!r}: {number} of {len(rows)} training prompts are longer than the {most} tokens that "
        f"max_length leaves beside answers of {encoder.max_new_tokens}, and are shortened"
    )


def _unknown(
    name: str, encoder: Encoder, splits: dict[str, Sequence[Example]], wrong: dict[tuple[str, int], str]
) -> str:
    sample = encoder.tokenizer("{}\n~\u00e9\u4e2d\U0001f600", add_special_tokens=False)["input_ids"]
    if encoder.tokenizer.unk_token_id not in sample:
        return ""  # it knows all characters
    rows = [row for split, some in splits.items() for i, row in enumerate(some) if (split, i) not in wrong]
    found = [row for row in rows if encoder.unknown(row)]
    if not found:
        return ""
    where = f", the first at {found[0].place}" if found[0].place else ""
    return (
        f"task {name!r}: {len(found)} of {len(rows)} rows hold characters that the model's vocabulary lacks{where}: "
        f"it sees {encoder.tokenizer.unk_token} for each, and answers cannot be told apart by them"
    )
