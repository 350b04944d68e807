"""Which columns of the user's rows are question and answer, and that nothing beside them is left out unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from string import Formatter
from typing import TYPE_CHECKING, Any

from pm_llm.tasks.base import Example
from pm_llm.tasks.chats import chat_of, text_of, tools_of, up_to_answer
from pm_llm.tasks.files import Row, short
from pm_llm.tasks.problems import Problems

if TYPE_CHECKING:
    from pm_llm.tasks.user import UserTask

INSTRUCTION, INPUT, CONTEXT = "instruction", "input", "context"  # the others join the first
BEFORE = SYSTEM, HISTORY = "system", "history"  # what was said before the question
# columns that are found without being named, the first pair that is there
PAIRS = (
    *(("prompt", answer) for answer in ("completion", "answer", "response", "label")),
    *(("instruction", answer) for answer in ("output", "response", "answer")),
    *(("question", answer) for answer in ("answer", "response", "answers")),
    *(("input", answer) for answer in ("output", "label", "target")),
    *(("text", answer) for answer in ("label", "target")),
    *(("sentence", answer) for answer in ("label",)),
)
PROMPTS = ("prompt", "instruction", "question", "input", "text", "sentence")  # alone, where no answer is needed
NO_ANSWER = ""  # in place of the answer's column
CHATS = ("messages", "conversations", "conversation")
TEXT = "text"  # alone: raw text
CHOSEN, REJECTED = "chosen", "rejected"  # of a preference pair


def examples_of(rows: Iterable[Row], spec: UserTask, problems: Problems, prompts: bool = False) -> Iterator[Example]:
    """The rows, which are gone through three times, as examples; what is wrong with them, or would be left out of
    them, goes to `problems`.

    With `prompts` rows may be prompts alone, and chats may end with a question; their answers are empty then.
    """
    rows = _Without(rows, frozenset(spec.ignore))
    found: Counter[Columns | None] = Counter()
    first: Row | None = None
    for row in rows:
        first = first or row
        found[columns_of(row.values, spec, prompts)] += 1
    if first is None:
        return
    if list(found) == [None]:
        problems.add(
            first.place,
            f"the columns are {', '.join(map(str, first.values))}; needed are prompt and completion, or messages, "
            "or text, or chosen and rejected. Name yours with `prompt` and `completion`, or `messages`, or `text`.",
        )
        return
    common = max((columns for columns in found if columns is not None), key=found.__getitem__)
    if not _all_used(rows, first, common, spec, problems):
        return
    for row in rows:
        example = common.example(row, spec, problems, prompts)
        if example is not None:
            yield example


class _Without:
    """Rows without the columns that the user leaves out."""

    def __init__(self, rows: Iterable[Row], ignored: frozenset[str]) -> None:
        self.rows, self.ignored = rows, ignored

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            kept = {name: value for name, value in row.values.items() if name not in self.ignored}
            yield row if len(kept) == len(row.values) else Row(kept, row.place)


def _all_used(rows: Iterable[Row], one: Row, columns: Columns, spec: UserTask, problems: Problems) -> bool:
    """Whether nothing of the rows is left out unsaid: what is neither used nor in `ignore` is refused, or told where
    it is of numbers, or the user named the columns that count."""
    used = {*columns.used(), spec.id}
    joined = {*columns.joins}
    left: dict[str, Row] = {}
    for row in rows:
        for name, value in row.values.items():
            turns = name == "tools" and isinstance(row.values.get(columns.prompt[0] if columns.prompt else ""), list)
            read = turns or (name in used and (name not in joined or isinstance(value, str)))
            if not read and name not in left and value not in (None, "", [], {}) and str(value).strip():
                left[str(name)] = row
    named = spec.prompt is not None or spec.messages is not None or spec.text is not None
    texts = [] if named else [n for n, row in left.items() if not _is_number(row.values[n])]
    if texts:
        first = columns.prompt[0]
        together = ", ".join([*columns.prompt, *texts])
        template = "\\n".join(f"{{{n}}}" for n in [*columns.prompt, *texts])
        how = (
            f"Leave out with `ignore: [{', '.join(texts)}]`"
            if columns.completion is None or columns.kind != "prompt"
            else f'Join them with `prompt: [{together}]` or `prompt: "{template}"`, leave them out with '
            f"`ignore: [{', '.join(texts)}]`, or name `prompt: {first}` to go without"
        )
        beside = columns.completion or ("its turns" if columns.completion is None else "no answer")
        beside = "nothing beside it" if columns.kind == "text" else beside
        problems.add(
            left[texts[0]].place,
            f"{first} and {beside} leave out {', '.join(texts)}. {how}.",
        )
        return False
    if left:
        problems.note(f"{one.place.rpartition(':')[0]}: not used: {', '.join(left)}")
    return True


def _is_number(value: Any) -> bool:
    """Also one that a table's reader has made a text of."""
    if isinstance(value, str):
        return value.strip().removeprefix("-").replace(".", "", 1).isdecimal()
    return isinstance(value, (bool, int, float))


def columns_of(values: Mapping[str, Any], spec: UserTask, prompts: bool = False) -> Columns | None:
    """Where a row's question and answer stand; None if nothing is named and nothing known is found. With `prompts`
    there need be no answer."""
    if spec.text is not None:
        return Columns((spec.text,), NO_ANSWER, kind="text")
    if spec.messages is not None:
        return Columns((spec.messages,))
    if values.keys() >= {CHOSEN, REJECTED} and spec.completion is None:
        return _pair(values, spec)
    if spec.prompt is not None or spec.completion is not None:
        given = spec.prompt if spec.prompt is not None else "prompt"
        names, template = _named(given)
        answer = spec.completion or ("completion" if "completion" in values or not prompts else NO_ANSWER)
        return Columns(names, answer, template)
    pair = next((pair for pair in PAIRS if values.keys() >= set(pair)), None)
    chat = next((Columns((chat,)) for chat in CHATS if chat in values), None)
    if pair is None and chat is not None:
        return chat
    if pair is None and not prompts:
        return Columns((TEXT,), NO_ANSWER, kind="text") if TEXT in values else None
    alone = next((name for name in PROMPTS if name in values), None)
    if pair is None and alone is None:
        return None
    prompt, completion = pair or (str(alone), NO_ANSWER)
    return Columns((prompt,), completion, joins=(INPUT, CONTEXT) if prompt == INSTRUCTION else (), before=BEFORE)


def _pair(values: Mapping[str, Any], spec: UserTask) -> Columns:
    """Those of a preference pair; its prompt may stand in both answers."""
    given = spec.prompt if spec.prompt is not None else next((name for name in PROMPTS if name in values), None)
    names, template = _named(given or [])
    return Columns(names, CHOSEN, template, before=BEFORE, kind="preference")


def _named(given: str | list[str]) -> tuple[tuple[str, ...], str | None]:
    """The columns that a `prompt` names, and the template that it is, if it is one."""
    if not isinstance(given, str):
        return tuple(given), None
    fields = tuple(_fields(given))
    return (fields, given) if fields else ((given,), None)


def _fields(template: str) -> list[str]:
    """The columns that a template such as `{question}\\n{choices}` names; empty: it is the name of a column."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError:
        return []


@dataclass(frozen=True)
class Columns:
    """Where question and answer stand: columns that are joined (or a template of them), the answer's, those that join
    where a row has a text there, and those of what was said before the question. Without `completion` the one column
    holds a chat. Of raw text the one column is all; of a preference pair `completion` is the better answer, `rejected`
    beside it, and there may be no prompt."""

    prompt: tuple[str, ...]
    completion: str | None = None
    template: str | None = None
    joins: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    kind: str = "prompt"

    def used(self) -> set[str]:
        """Every column that is read."""
        more = {"tools"} if self.completion is None or self.kind == "preference" else set()
        more |= {REJECTED} if self.kind == "preference" else set()
        return {*self.prompt, *self.before, *self.joins, *more} | ({self.completion} if self.completion else set())

    def example(self, row: Row, spec: UserTask, problems: Problems, prompts: bool = False) -> Example | None:
        """The row as an example; None, with the reason in `problems`, if it is none."""
        given = row.values.get(spec.id)
        name = None if given is None else str(given)
        if self.kind == "text":
            text = row.text(self.prompt[0], problems)
            return None if text is None else Example("", text, id=name, place=row.place, kind="text")
        if self.kind == "preference":
            return self._preference(row, name, problems)
        if self.completion is None:
            return _chat(row, self.prompt[0], row.values.get(self.prompt[0]), name, problems, prompts)
        answer = row.values.get(self.completion)
        if prompts and isinstance(row.values.get(self.prompt[0]), list) and len(self.prompt) == 1 and answer is None:
            return _chat(row, self.prompt[0], row.values[self.prompt[0]], name, problems, prompts)
        if isinstance(answer, list) and isinstance(row.values.get(self.prompt[0]), list) and len(self.prompt) == 1:
            before = _turns_before(row, self.before, problems)
            if before is None:
                return None
            both = [*before, *row.values[self.prompt[0]], *answer]  # turns, as TRL has them
            return _chat(row, f"{self.prompt[0]} and {self.completion}", both, name, problems)
        return self._plain(row, name, problems)

    def _preference(self, row: Row, name: str | None, problems: Problems) -> Example | None:
        """A pair, of texts or of turns; without a prompt by itself, that is what both answers begin with."""
        if not self.prompt:
            found = _begin_alike(row.values[CHOSEN], row.values[REJECTED])
            if isinstance(found, str):
                problems.row(row.place, found)
                return None
            row = Row({**row.values, **dict(zip(("prompt", CHOSEN, REJECTED), found, strict=True))}, row.place)
        columns = replace(self, prompt=self.prompt or ("prompt",))
        better, worse = (columns._one_of_two(row, key, name, problems) for key in (CHOSEN, REJECTED))
        if better is None or worse is None:
            return None
        if (better.messages, better.body) != (worse.messages, worse.body):
            problems.row(row.place, "chosen and rejected answer different prompts.")
            return None
        if better.turn or worse.turn:
            problems.row(row.place, "an answer of a pair is a tool call or has thoughts; only texts can be compared.")
            return None
        return replace(better, rejected=worse.completion, kind="preference")

    def _one_of_two(self, row: Row, key: str, name: str | None, problems: Problems) -> Example | None:
        """The prompt with one of its two answers."""
        asked, said = row.values.get(self.prompt[0]), row.values.get(key)
        if not isinstance(said, list):
            return replace(self, completion=key, kind="prompt")._plain(row, name, problems)
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        whole = said if len(said) > 1 and _begins(said, asked or []) else [*(asked or []), *said]
        before = _turns_before(row, self.before, problems)
        return None if before is None else _chat(row, key, [*before, *whole], name, problems)

    def _plain(self, row: Row, name: str | None, problems: Problems) -> Example | None:
        wanted = [*self.prompt, *(column for column in self.joins if _has_text(row, column))]
        texts = {n: self._text(row, n, problems, joined=len(self.prompt) > 1) for n in wanted}
        answers = [""] if self.completion == NO_ANSWER else _answers(row, self.completion or "", problems)
        if answers is None or not all(text is not None for text in texts.values()):
            return None
        body = self.template.format(**texts) if self.template else "\n\n".join(text or "" for text in texts.values())
        turns = _turns_before(row, self.before, problems)
        if turns is None:
            return None
        messages, whole = None, body
        if turns:
            messages = (*turns, {"role": "user", "content": body})
            whole = "\n\n".join(turn["content"] for turn in messages)
        return Example(whole, answers[0], messages=messages, alternatives=tuple(answers[1:]), id=name, place=row.place)

    @staticmethod
    def _text(row: Row, column: str, problems: Problems, joined: bool) -> str | None:
        value = row.values.get(column)
        if joined and isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value):
            return "\n".join(value)
        if joined and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return row.text(column, problems)


def _begin_alike(better: Any, worse: Any) -> tuple[Any, Any, Any] | str:
    """What two answers begin with, and each without it; or why they cannot be parted. Texts are cut between words."""
    if {type(better), type(worse)} not in ({str}, {list}):
        return "chosen and rejected must be two texts, or two lists of turns."
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(better, worse, strict=False)))
    if isinstance(better, str):
        same = len(better[:same].rstrip()) and next((i for i in range(same, 0, -1) if better[i - 1].isspace()), 0)
    if not same:
        return "chosen and rejected begin with no common prompt. Give one as `prompt`."
    return better[:same], better[same:], worse[same:]


def _begins(turns: Sequence[Any], first: Sequence[Any]) -> bool:
    """Whether turns begin with others, by what is said."""
    said = [
        [turn.get("content", turn.get("value")) for turn in some if isinstance(turn, dict)] for some in (turns, first)
    ]
    return said[0][: len(said[1])] == said[1]


def _has_text(row: Row, column: str) -> bool:
    """A text; of another type it says something of the row (where it is from, and the like)."""
    value = row.values.get(column)
    return isinstance(value, str) and bool(value.strip())


def _answers(row: Row, column: str, problems: Problems) -> list[str] | None:
    """The right answers: a text, or the `text` of SQuAD's answers, of which the first is trained."""
    value = row.values.get(column)
    listed = value.get("text") if isinstance(value, dict) else None
    if isinstance(listed, list) and listed and all(isinstance(x, str) for x in listed):
        return list(dict.fromkeys(listed))
    text = row.text(column, problems)
    return None if text is None else [text]


def _turns_before(row: Row, columns: Sequence[str], problems: Problems) -> list[dict[str, Any]] | None:
    """Alpaca's `system` and `history` (pairs of an earlier question and answer) as turns."""
    turns: list[dict[str, Any]] = []
    if SYSTEM in columns and row.values.get(SYSTEM):
        text = row.text(SYSTEM, problems)
        if text is None:
            return None
        turns.append({"role": "system", "content": text})
    for pair in (row.values.get(HISTORY) or []) if HISTORY in columns else []:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            problems.row(row.place, f"history holds {short(pair)}; it must be pairs of a question and its answer.")
            return None
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _chat(
    row: Row, column: str, given: Any, name: str | None, problems: Problems, prompts: bool = False
) -> Example | None:
    turns, tools = chat_of(row, column, given, problems), tools_of(row, problems)
    if turns is None or tools is None:
        return None
    if prompts and turns[-1]["role"] == "user":
        return Example("", "", messages=tuple(turns), id=name, place=row.place, tools=tools)
    found = up_to_answer(turns)
    if isinstance(found, str):
        problems.row(row.place, found)
        return None
    before, answer = found
    whole = answer if answer.keys() - {"role", "content"} else None
    return Example("", text_of(answer), messages=tuple(before), id=name, place=row.place, tools=tools, turn=whole)
