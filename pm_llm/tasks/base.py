"""A task: rows of prompt and completion with splits and a scorer."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.system.coerce import name_of
from pm_llm.tasks.problems import Problems

if TYPE_CHECKING:
    from pm_llm.evaluation.harness import Outside

MAX_CHARACTERS = 1_000_000  # of one prompt: more is a file in a cell, not a prompt
SPLITS = ("train", "validation", "test")
DEFAULT_SCORER = {"prompt": "exact_match", "text": "perplexity", "preference": "pair_accuracy"}
EMPTY = {
    "prompt": "its answer (completion or label) is empty. Every row needs one.",
    "text": "its text is empty.",
    "preference": "one of its two answers is empty.",
}


@dataclass(frozen=True)
class Example:
    """One row. The prompt is `head + body + tail`; only `body` may be shortened to fit, so the answer frame stays.

    Where head and tail are empty (the user's own prompts), the middle of the body is what goes.

    `messages` replaces the three for chat data: the turns before the answer, rendered by the chat template, which is
    given `tools` too; `turn` is the answer's own turn where it is more than `completion`, its text (tool calls,
    thoughts). Where the model has no template, `body` stands in for the turns if there is one.
    `alternatives` are other right answers besides the completion; `source` is the text that SARI compares with.

    `kind` says what the row is (of :data:`pm_llm.families.base.KINDS`): of raw text, `completion` is all there is; of
    a preference pair `completion` is the better answer and `rejected` the worse one.
    """

    body: str
    completion: str
    head: str = ""
    tail: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    alternatives: tuple[str, ...] = ()
    source: str | None = None
    id: str | None = None
    place: str = ""
    tools: tuple[Any, ...] = ()
    turn: dict[str, Any] | None = None
    rejected: str | None = None
    kind: str = "prompt"

    @property
    def prompt(self) -> str:
        """The whole prompt, before any shortening and without the chat template."""
        if self.messages is not None:
            return "\n".join(turn.get("content") or "" for turn in self.messages)
        return self.head + self.body + self.tail

    @property
    def framed(self) -> bool:
        """Whether the prompt is one of the project's own, around a text."""
        return bool(self.head or self.tail)

    @property
    def references(self) -> list[str]:
        """All right answers."""
        return [self.completion, *self.alternatives]

    @property
    def texts(self) -> list[str]:
        """All that is said in it, and may be learnt."""
        return [*self.references, *([] if self.rejected is None else [self.rejected])]


def picked(rows: Sequence[Example], numbers: Sequence[int]) -> Sequence[Example]:
    """Rows by their numbers; of rows in a file (:class:`pm_llm.tasks.store.Stored`) a view."""
    select: Callable[..., Sequence[Example]] | None = getattr(rows, "select", None)
    return [rows[i] for i in numbers] if select is None else select(numbers)


@dataclass(frozen=True)
class Kept:
    """What a run has kept of a finished task: its longest answer in tokens, the digests of its training and its test
    rows, how many it had, and of which kind."""

    answer: int
    train: str
    test: str
    train_rows: int
    test_rows: int
    kind: str = "prompt"


@dataclass(frozen=True)
class Room:
    """How long a task's rows may be, whatever the configuration says: in tokens, with the answer, and of an answer."""

    max_length: int
    max_new_tokens: int


@dataclass(frozen=True)
class Task:
    """A named task. `labels` are the options of a classification task, in prompt order, if it is one.

    Where boundaries are blurred, `foreign` are its neighbours' rows that are trained with its own, by their task's
    name, and `whole` all its own rows, of which `train` is what is left.

    `special_tokens` says what the text of a special token means in a row: `text`, its letters, `token`, the token, or
    None: nothing is said, and such rows are refused. `loss_on` says which turns of a chat are learnt: those of the
    `assistant`, but for such with `weight` 0, or the `last` of them alone.

    `source` is what the configuration gave, `files` what was read, each with its size in bytes and its time of change
    in ns. `kept` is there for a task that a run has finished: it has no training rows any more. `room` is there for
    rows of the project's own, whose lengths are known and of which nothing may be cut. `outside` is there for a task
    that another program asks and scores.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    scorer: str = "exact_match"
    labels: tuple[str, ...] = ()
    validation: Sequence[Example] = ()
    foreign: tuple[tuple[str, Sequence[Example]], ...] = ()
    whole: Sequence[Example] = ()
    special_tokens: str | None = "text"
    loss_on: str = "assistant"
    source: str = ""
    files: tuple[tuple[str, int, int], ...] = ()
    kept: Kept | None = None
    room: Room | None = None
    outside: Outside | None = None

    @property
    def kind(self) -> str:
        """What its rows are, see :class:`Example`."""
        if self.kept is not None:
            return self.kept.kind
        return next((row.kind for some in (self.train, self.test, self.whole) for row in some[:1]), "prompt")

    @classmethod
    def from_dataset(cls, name: str, train: Any, test: Any = None, validation: Any = None, **keys: Any) -> Task:
        """A task of datasets in memory (`datasets.Dataset`, a stream, or pandas' rows by `Dataset.from_pandas`).

        Args:
            name: The task's.
            train: The training rows.
            test: The rows that it is scored on; by default `validation`, or a share `test_size` of the training rows.
            validation: Rows for choosing settings.
            keys: As an entry of `tasks` has them, see :class:`pm_llm.tasks.user.UserTask`: `prompt`, `completion`,
                `messages`, `text`, `ignore`, `labels`, `scorer`, `loss_on` ...

        Raises:
            PmLlmError: With everything that is wrong with the rows, each by split and number.
        """
        from pm_llm.tasks.user import task_in_memory

        return task_in_memory(name, {"train": train, "test": test, "validation": validation}, keys)

    @classmethod
    def from_rows(
        cls,
        name: str,
        train: Sequence[dict[str, Any]],
        test: Sequence[dict[str, Any]] | None = None,
        validation: Sequence[dict[str, Any]] | None = None,
        **keys: Any,
    ) -> Task:
        """A task of rows as mappings, such as `{"prompt": "is 2 even ?", "completion": "yes"}`; as
        :meth:`from_dataset`."""
        return cls.from_dataset(name, train, test, validation, **keys)

    def checked(self, problems: Problems, explained: bool = False, answers: bool = True) -> Task:
        """This task, without the rows that `problems` says to drop; what is wrong is added to `problems`.

        Args:
            problems: Where what is wrong goes.
            explained: Whether `problems` says already why a split has no rows.
            answers: Whether every row needs one.
        """
        from pm_llm.evaluation.scorers import SCORERS

        if self.scorer not in SCORERS:
            raise unknown_name(f"scorer of task {self.name!r}:", self.scorer, SCORERS)
        name_of(self.name, "the name of a task")
        fitting = [name for name in SCORERS if self.kind in SCORERS[name].kinds]
        if self.scorer not in fitting:
            raise PmLlmError(
                f"task {self.name!r}: scorer {self.scorer} does not score rows of the kind {self.kind}. "
                f"Use {', '.join(fitting)}."
            )
        self._check_labels(problems)
        seen: dict[int, tuple[str, int]] = {}
        kept: dict[str, Any] = {split: self._good(split, seen, problems, answers) for split in SPLITS}
        empty = [split for split in ("train", "test") if not kept[split]]
        if empty and not explained:
            problems.add("", f"task {self.name!r} has no {empty[0]} rows. Check its file, split name and filters.")
        return replace(self, **kept)

    def _check_labels(self, problems: Problems) -> None:
        from pm_llm.evaluation.scorers import compared

        first: dict[str, str] = {}
        for label in self.labels if self.scorer == "exact_match" else ():
            same = first.setdefault(compared(label), label)
            if same != label:
                problems.add(
                    "",
                    f"task {self.name!r}: exact_match takes the labels {same!r} and {label!r} for one, as it looks at "
                    "neither case nor punctuation. Use scorer accuracy.",
                )

    def _good(
        self, split: str, seen: dict[int, tuple[str, int]], problems: Problems, answers: bool
    ) -> Sequence[Example]:
        """The split's good rows; `seen` are the ids so far, by file, with split and number of their rows."""
        rows: Sequence[Example] = getattr(self, split)
        kept = array("q")
        kind = self.kind
        for number, row in enumerate(rows):
            place = self._place(split, number, row)
            wrong = self._wrong(row, kind, answers)
            if wrong is None and row.id is not None:
                first = seen.setdefault(hash((place.rpartition(":")[0], row.id)), (split, number))
                before = place if first == (split, number) else self._place(*first)
                wrong = None if before == place else f"its id {row.id!r} is that of {before} too."
            if wrong is None:
                kept.append(number)
            else:
                problems.row(place, wrong)
        return picked(rows, kept)

    def _place(self, split: str, number: int, row: Example | None = None) -> str:
        row = row or getattr(self, split)[number]
        return row.place or f"task {self.name!r}, {split}:row {number + 1}"

    def _wrong(self, row: Example, kind: str, answers: bool) -> str | None:
        if row.kind != kind:
            return f"it is of the kind {row.kind!r}, and the task's first row of {kind!r}. Make two tasks of them."
        if answers and not all(text.strip() for text in row.texts):
            return EMPTY[row.kind]
        if row.kind == "preference" and row.rejected == row.completion:
            return "its two answers are one. A pair needs a better and a worse one."
        if not row.prompt.strip() and row.kind != "text":
            return "its prompt is empty."
        if row.kind == "text" and self.labels:
            return "raw text has no labels. Name the columns with `prompt` and `completion`, or leave `labels` out."
        if len(row.prompt) > MAX_CHARACTERS:
            return f"its prompt has {len(row.prompt):,} characters; at most {MAX_CHARACTERS:,} are taken."
        if answers and self.labels and row.completion not in self.labels:
            return f"its label {row.completion!r} is none of the task's: {', '.join(self.labels)}."
        return None

    def subset(self, train: int | None, test: int | None, seed: int) -> Task:
        """At most `train` and `test` rows (`test` of validation too), drawn by `seed` and the task's name."""

        def draw(split: str, n: int | None) -> Sequence[Example]:
            rows: Sequence[Example] = getattr(self, split)
            if n is None or n >= len(rows):
                return rows
            return picked(rows, random.Random(f"{seed} {self.name} {split}").sample(range(len(rows)), n))

        return replace(self, train=draw("train", train), test=draw("test", test), validation=draw("validation", test))


def checked(tasks: Sequence[Task]) -> list[Task]:
    """Tasks made in Python, checked like those from files. Raises PmLlmError with all that is wrong."""
    problems = Problems()
    for number, one in enumerate(tasks):
        if not isinstance(one, Task):
            raise PmLlmError(
                f"tasks[{number}] is a {type(one).__name__}. Make it a task: Task.from_dataset('name', train=..., "
                "test=...) of datasets, Task.from_rows of lists of mappings."
            )
    found = [task if task.kept else task.checked(problems) for task in tasks]
    problems.check()
    return found


def distinct(tasks: Sequence[Task]) -> dict[str, Task]:
    """Name -> task, of a recurring task the first. Raises PmLlmError if two of one name are not the same task."""
    found: dict[str, Task] = {}
    for task in tasks:
        first = found.setdefault(task.name, task)
        if first is not task and _content(first) != _content(task):
            raise PmLlmError(
                f"two tasks of other rows, labels or scorers have one name: {task.name}. Give each its own."
            )
    return found


def _content(task: Task) -> tuple[Any, ...]:
    """What makes a task the same, wherever its rows were read."""
    rows = ([replace(row, id=None, place="") for row in some] for some in (task.test, task.whole or task.train))
    return task.scorer, task.labels, *rows


def check_while(problems: Problems, load: Callable[[Problems], Task], answers: bool = True) -> Task:
    """The task that `load` gives, checked; with `answers` every row needs one."""
    before, opened = problems.whole, len(problems.files)
    task = load(problems)
    files = dict.fromkeys((str(path), size, time) for path, size, time in problems.files[opened:])
    task = replace(task, files=tuple(files))
    return task.checked(problems, explained=problems.whole > before, answers=answers)
