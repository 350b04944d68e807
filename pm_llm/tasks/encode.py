"""From rows to token ids: one rendering for training, Fisher and generation, in which the answer frame survives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks import Example, Task
from pm_llm.tasks.problems import Problems


@dataclass(frozen=True)
class Encoder:
    """Renders examples for one model.

    Args:
        tokenizer: The model's tokenizer.
        seq2seq: Whether the model is an encoder-decoder.
        max_length: Longest input in tokens: prompt plus answer for a decoder, prompt for an encoder-decoder.
        max_new_tokens: Longest answer in tokens, with the end-of-sequence token.
    """

    tokenizer: Any
    seq2seq: bool
    max_length: int
    max_new_tokens: int

    @property
    def prompt_budget(self) -> int:
        """Tokens a prompt may have; the same in training and generation, so that both see one frame."""
        return self.max_length if self.seq2seq else self.max_length - self.max_new_tokens

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt, shortened where it is too long: the end of a framed row's body, the middle of a
        prompt without frame or of a chat's last turn."""
        body, ids = _body(example), self.whole_prompt(example)
        while len(ids) > self.prompt_budget:
            pieces = self.tokenizer(body, add_special_tokens=False)["input_ids"]
            keep = len(pieces) - max(1, len(ids) - self.prompt_budget)
            if not pieces or (keep <= 0 and not body):
                raise PmLlmError(
                    f"the prompt's frame alone has {len(ids)} tokens, and max_length leaves {self.prompt_budget} "
                    "for it. Raise max_length."
                )
            # without a frame the question may stand at either end: cut out the middle
            back = max(keep, 0) // 2 if example.messages or not (example.head or example.tail) else 0
            front = pieces[: max(keep, 0) - back]
            shorter = self.tokenizer.decode([*front, *pieces[len(pieces) - back :]], skip_special_tokens=True)
            body = shorter if len(shorter) < len(body) else body[: len(body) // 2]
            ids = self._render(example, body)
        return ids

    def check(self, examples: Sequence[Example], problems: Problems) -> None:
        """Tell of the rows whose prompt would not fit however much of its body is cut."""
        frames: dict[tuple[str, str], str | None] = {}
        for row in examples:
            if row.messages is not None:
                wrong = self._wrong(replace(row, messages=(*row.messages[:-1], {**row.messages[-1], "content": ""})))
            elif (row.head, row.tail) in frames:
                wrong = frames[row.head, row.tail]
            else:
                wrong = frames[row.head, row.tail] = self._wrong(replace(row, body=""))
            if wrong is not None:
                problems.row(row.place, wrong)

    def _wrong(self, frame: Example) -> str | None:
        length = len(self.whole_prompt(frame))
        if length <= self.prompt_budget:
            return None
        return (
            f"without what may be cut its prompt has {length} tokens already, and max_length leaves "
            f"{self.prompt_budget} for it. Raise max_length."
        )

    def whole_prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt as it is."""
        return self._render(example, _body(example))

    def answer(self, example: Example) -> list[int]:
        """Token ids of the answer with end of sequence, cut at `max_new_tokens`."""
        return self.whole_answer(example)[: self.max_new_tokens]

    def whole_answer(self, example: Example) -> list[int]:
        """Token ids of the whole answer with end of sequence."""
        return answer_ids(self.tokenizer, self.seq2seq, example)

    def features(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of each example; a decoder's labels are -100 on the prompt."""
        rows = []
        for example in examples:
            prompt, answer = self.prompt(example), self.answer(example)
            if self.seq2seq:
                rows.append({"input_ids": prompt, "labels": answer})
            else:
                rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return rows

    def _render(self, example: Example, body: str) -> list[int]:
        if example.messages is None:
            ids = self.tokenizer(example.head + body + example.tail)["input_ids"]
        else:
            turns = [*example.messages[:-1], {**example.messages[-1], "content": body}]
            text = _chat(self.tokenizer, turns, prompt=True) + _answered(self.tokenizer, example)[0]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # some tokenizers end every text with end of sequence: right for T5's encoder, wrong before an answer
        if not self.seq2seq and ids and ids[-1] == self.tokenizer.eos_token_id and example.messages is None:
            ids = ids[:-1]
        return ids


def _body(example: Example) -> str:
    """What may be shortened."""
    return example.messages[-1]["content"] if example.messages else example.body


def answer_ids(tokenizer: Any, seq2seq: bool, example: Example) -> list[int]:
    """Token ids of the whole answer, ending with end of sequence."""
    if example.messages is not None:
        text = _answered(tokenizer, example)[1]
    else:
        # a decoder goes on from "...Answer:" with a space before the word
        glue = "" if seq2seq or not example.prompt or example.prompt[-1].isspace() else " "
        text = glue + example.completion.strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def encoders_for(config: RunConfig, tasks: Iterable[Task]) -> dict[str, Encoder]:
    """Task name -> how its rows are rendered for `config.model`, after a look at every row.

    Raises:
        PmLlmError: With every row whose frame alone is too long or that the chat template refuses.
    """
    from pm_llm.models import load_tokenizer

    tokenizer, seq2seq = load_tokenizer(config.model)
    problems, encoders = Problems(), {}
    for task in tasks:
        rows = [*(task.whole or task.train), *task.validation, *task.test]  # what neighbours may train on, too
        before = len(problems.found)
        for row in rows:
            refused = chat_problem(tokenizer, row)
            if refused:
                problems.row(row.place, refused)
        if len(problems.found) == before:
            encoder = encoder_for(tokenizer, seq2seq, task, config.max_length, config.max_new_tokens)
            encoder.check(rows, problems)
            encoders[task.name] = encoder
    problems.check()
    return encoders


def encoder_for(tokenizer: Any, seq2seq: bool, task: Task, max_length: int, max_new_tokens: int | None) -> Encoder:
    """How a task's rows are rendered, by default with room for its longest training answer.

    Raises:
        PmLlmError: If the answers leave no room for prompts.
    """
    answer = max_new_tokens or longest_answer(tokenizer, seq2seq, task)
    encoder = Encoder(tokenizer, seq2seq, max_length, answer)
    if encoder.prompt_budget < 1:
        raise PmLlmError(
            f"task {task.name!r}: answers of {answer} tokens leave none of max_length {max_length} for prompts. "
            "Raise max_length, or set max_new_tokens to cut long answers."
        )
    return encoder


def longest_answer(tokenizer: Any, seq2seq: bool, task: Task) -> int:
    """Tokens of the longest training answer of a task, with end of sequence."""
    distinct = {row.completion: row for row in task.whole or task.train}.values()
    return max(len(answer_ids(tokenizer, seq2seq, row)) for row in distinct)


def chat_problem(tokenizer: Any, example: Example) -> str | None:
    """Why the model's chat template does not render a chat, if it does not."""
    if example.messages is None or not tokenizer.chat_template:
        return None
    try:
        _chat(tokenizer, [*example.messages, {"role": "assistant", "content": example.completion}], prompt=False)
        _chat(tokenizer, example.messages, prompt=True)
    except TemplateError as error:
        return f"the model's chat template refuses it: {error}."
    return None


def _answered(tokenizer: Any, example: Example) -> tuple[str, str]:
    """What the chat template puts between its generation prompt and an answer, such as Qwen3's empty thoughts, and
    the answer as it ends a turn. The first belongs to the prompt: no answer is learnt or judged by it. An answer that
    brings thoughts of its own has none before it."""
    turns = list(example.messages or ())
    before = _chat(tokenizer, turns, prompt=True)

    def after(answer: str) -> str:
        whole = _chat(tokenizer, [*turns, {"role": "assistant", "content": answer}], prompt=False)
        return whole[len(before) :] if whole.startswith(before) else answer

    said, mark = after(example.completion), "7answer7"
    between, found, _ = after(mark).partition(mark)
    if not found or not between.strip() or not said.startswith(between):
        between = ""
    return between, said[len(between) :].strip()


def _chat(tokenizer: Any, turns: Sequence[dict[str, str]], prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise PmLlmError(
            "the rows are chats, but the model's tokenizer has no chat template. "
            "Use an instruction-tuned model, or rows with prompt and completion."
        )
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
