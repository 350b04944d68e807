"""From rows to token ids: one rendering for training, Fisher and generation, in which the answer frame survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.families.base import Family, Row
from pm_llm.system.files import sha256_of
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.chat_template import MARK, answer_of, problem_of, render, trained_turns
from pm_llm.tasks.chats import text_of


@dataclass(frozen=True)
class Encoder:
    """Renders examples for one model.

    Args:
        tokenizer: The model's tokenizer.
        family: The model's.
        max_length: Longest input in tokens: prompt plus answer for a decoder, prompt for an encoder-decoder.
        max_new_tokens: Longest answer in tokens, with the end-of-sequence token.
        special_tokens: What the text of a special token in a row is, see :class:`pm_llm.tasks.base.Task`.
        loss_on: Which turns of a chat are learnt, see there.
    """

    tokenizer: Any
    family: Family
    max_length: int
    max_new_tokens: int
    special_tokens: str | None = "text"
    loss_on: str = "assistant"

    @property
    def prompt_budget(self) -> int:
        """Tokens a prompt may have; the same in training and generation, so that both see one frame."""
        return self.family.prompt_budget(self.max_length, self.max_new_tokens)

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt, shortened where it is too long: the end of a framed row's body, the middle of a
        prompt without frame or of a chat's last turn. Text is cut between characters."""
        return self.asked(example)[0]

    def asked(self, example: Example) -> tuple[list[int], list[int]]:
        """The same, and its labels: the ids of earlier turns that are learnt, -100 elsewhere."""
        body = self._body(example)
        ids, labels = self._render(example, body)
        while len(ids) > self.prompt_budget:
            spans = self._spans(body)
            keep = len(spans) - max(1, len(ids) - self.prompt_budget)
            if not spans or (keep <= 0 and not body):
                raise PmLlmError(
                    f"the prompt's frame alone has {len(ids)} tokens, and max_length leaves {self.prompt_budget} "
                    "for it. Raise max_length."
                )
            # without a frame the question may stand at either end: cut out the middle
            keep = max(keep, 0)
            back = keep // 2 if self.is_chat(example) or not example.framed else 0
            shorter = body[: spans[keep - back][0]] + body[spans[len(spans) - back - 1][1] :]
            body = shorter if len(shorter) < len(body) else body[: len(body) // 2]
            ids, labels = self._render(example, body)
        return ids, labels

    def _spans(self, body: str) -> list[tuple[int, int]]:
        """Where in the text each of its tokens stands; those that share a character all have the whole of it."""
        if self.tokenizer.is_fast:
            encoded = self._encode(body, add_special_tokens=False, return_offsets_mapping=True)
            found: list[tuple[int, int]] = encoded["offset_mapping"]
            return found
        return [(i, i + 1) for i in range(len(body))]  # at most a token a character, nearly always

    def too_long(self, example: Example) -> str | None:
        """What to say of a row whose prompt does not fit however much of it is cut; None: it does."""
        if self.is_chat(example):
            messages = example.messages or ()
            frame = replace(example, messages=(*messages[:-1], {**messages[-1], "content": ""}))
        else:
            frame = replace(example, body="", messages=None)
        length = len(self.whole_prompt(frame))
        if length <= self.prompt_budget:
            return None
        return (
            f"without what may be cut its prompt has {length} tokens already, and max_length leaves "
            f"{self.prompt_budget} for it. Raise max_length."
        )

    def whole_prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt as it is."""
        return self._render(example, self._body(example))[0]

    def answer(self, example: Example) -> list[int]:
        """Token ids of the answer with end of sequence, cut at `max_new_tokens`."""
        return self.whole_answer(example)[: self.max_new_tokens]

    def whole_answer(self, example: Example) -> list[int]:
        """Token ids of the whole answer with end of sequence."""
        eos = self.tokenizer.eos_token_id
        if self.is_chat(example):
            text = answer_of(self.tokenizer, example, self.bare(example.completion))[1]
            ids = self.family.answer_ids(self, text, split_special_tokens=False)
        else:
            ids = self.family.answer_ids(self, self.family.lead(example) + self.content(example, example.completion))
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def is_chat(self, example: Example) -> bool:
        """Whether the chat template renders it: not where there is none, and the row has a text in its place."""
        return example.messages is not None and bool(self.tokenizer.chat_template or not example.body)

    def bare(self, answer: str) -> str:
        """An answer without the end of sequence that it may bring."""
        return answer.rstrip().removesuffix(self.tokenizer.eos_token) if self._brings_end(answer) else answer

    def _brings_end(self, answer: str) -> bool:
        return answer.rstrip().endswith(self.tokenizer.eos_token)

    def content(self, example: Example, answer: str) -> str:
        """What is trained of an answer: as it stands, but for the project's own prompts, whose frame goes around
        it."""
        return self.bare(answer).strip() if example.framed else self.bare(answer)

    def reference(self, example: Example, answer: str) -> str:
        """What predictions are compared with: blanks at the front count where the right answer begins with some. Tool
        calls are as the model would write them."""
        if example.turn is not None and answer == example.completion:
            return self.said(example, self.whole_prompt(example), self.whole_answer(example))
        text = self.content(example, answer)
        return text.rstrip() if text[:1].isspace() else text.strip()

    def said(self, example: Example, prompt: Sequence[int], output: Sequence[int]) -> str:
        """The text of generated tokens, as the right answer would be read."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        before = self.family.seen_before(prompt)
        front, whole = decode(before) if before else "", decode([*before, *output])
        return self.said_text(example, whole[len(front) :] if whole.startswith(front) else decode(output))

    def said_text(self, example: Example, text: str) -> str:
        """The same of an answer's text."""
        if self.is_chat(example):
            end = answer_of(self.tokenizer, example, MARK)[2]
            text = text.rstrip().removesuffix(end) if end else text
        said = str(text)
        if example.framed or not example.completion[:1].isspace():
            return said.strip()
        return said.removeprefix(self.family.lead(example)).rstrip()

    def unknown(self, example: Example) -> bool:
        """Whether the row holds characters that the vocabulary lacks, which are all one token to the model."""
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown in [*self.whole_prompt(example), *self.whole_answer(example)]

    @property
    def fingerprint(self) -> str:
        """What stands for all that tokens depend on."""
        tokenizer, backend = self.tokenizer, getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        names = [tokenizer.chat_template, str(tokenizer.special_tokens_map), type(tokenizer).__name__]
        own = [self.max_length, self.max_new_tokens, self.special_tokens, self.loss_on]
        return sha256_of([words, *names, *own, type(self.family).__name__, self.family.kind])

    def _encode(self, text: str, **how: Any) -> Any:
        return self.tokenizer(text, **{"split_special_tokens": self.special_tokens != "token", **how})

    def whole(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around it."""
        found: list[int] = self._encode(text)["input_ids"]
        return found

    def ids(self, text: str, **how: Any) -> list[int]:
        """Token ids of a text as it stands, without special tokens around it."""
        found: list[int] = self._encode(text, add_special_tokens=False, **how)["input_ids"]
        return found

    def features(self, examples: Sequence[Example]) -> list[Row]:
        """Training rows, as the family makes them: of a prompt and its answer `input_ids` and `labels`; a decoder's
        labels are -100 on the prompt."""
        return self.family.features(self, examples)

    def _render(self, example: Example, body: str) -> tuple[list[int], list[int]]:
        """Ids and labels of a prompt with that body."""
        if not self.is_chat(example):
            ids = self._encode(example.head + body + example.tail)["input_ids"]
            ids = self.family.open_prompt(ids, self.tokenizer.eos_token_id)
            return ids, [-100] * len(ids)
        turns = [*(example.messages or ())]
        between = answer_of(self.tokenizer, example, self.bare(example.completion))[0]
        turns[-1] = {**turns[-1], "content": body}
        text = render(self.tokenizer, turns, example.tools, prompt=True)
        whole = self.loss_on == "assistant" and self.family.learns_turns
        spans = trained_turns(self.tokenizer, replace(example, messages=tuple(turns)), text) if whole else []
        if not spans:
            ids = self.tokenizer(text + between, add_special_tokens=False)["input_ids"]
            return ids, [-100] * len(ids)
        if not self.tokenizer.is_fast:
            return self._piecewise(text + between, spans)
        encoded = self.tokenizer(text + between, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        # a token that begins with what stands before a turn, a blank, is its first
        learnt = [any(start < b <= stop and a < b for start, stop in spans) for a, b in places]
        return ids, [i if one else -100 for i, one in zip(ids, learnt, strict=True)]

    def _piecewise(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The same by a tokenizer that does not say where in a text its tokens stand: piece after piece."""
        found: tuple[list[int], list[int]] = ([], [])
        cuts = [0, *(at for span in spans for at in span), len(text)]
        for i, (start, stop) in enumerate(pairwise(cuts)):  # every second piece is learnt
            encode = self.family.answer_ids if i else Encoder.ids
            ids = encode(self, text[start:stop], split_special_tokens=False) if stop > start else []
            found[0].extend(ids)
            found[1].extend(ids if i % 2 else [-100] * len(ids))
        return found

    def _body(self, example: Example) -> str:
        """What may be shortened."""
        return (example.messages or ())[-1]["content"] if self.is_chat(example) else example.body

    def look(self, example: Example) -> tuple[str | None, int]:
        """What is wrong with a row for this model, if anything is, however much of its body is cut; and, of a chat,
        the tokens of its whole prompt."""
        length = 0
        if self.is_chat(example):
            refused = problem_of(self.tokenizer, example)
            if refused is not None:
                return refused, 0
            try:
                length = len(self.whole_prompt(example))
            except PmLlmError as error:
                return str(error), 0
        if self.special_tokens is None:
            texts = [*map(text_of, example.messages or ()), example.head, example.body, example.tail]
            texts += [self.bare(answer) for answer in example.texts]
            token = next((t for t in _special(self.tokenizer) if any(t in text for text in texts)), None)
            if token is not None:
                return (
                    f"it holds the text of the special token {token!r}. Say what that is with `special_tokens: text` "
                    "(its letters) or `special_tokens: token` (the token).",
                    0,
                )
        return None, length


@lru_cache
def _special(tokenizer: Any) -> tuple[str, ...]:
    return tuple(token for token in tokenizer.all_special_tokens if token)


def encoder_for(tokenizer: Any, family: Family, task: Task, max_length: int, max_new_tokens: int | None) -> Encoder:
    """How a task's rows are rendered, by default with room for its longest training answer.

    Raises:
        PmLlmError: If the answers leave no room for prompts.
    """
    encoder = Encoder(tokenizer, family, max_length, max_new_tokens or 1, task.special_tokens, task.loss_on)
    answer = family.answer_length(encoder, task.whole or task.train, max_new_tokens)
    return with_room(encoder, answer, task.name)


def with_room(encoder: Encoder, answer: int, name: str) -> Encoder:
    """The encoder with room for answers of so many tokens. Raises PmLlmError if they leave none for prompts."""
    encoder = replace(encoder, max_new_tokens=answer)
    if encoder.prompt_budget < 1:
        raise PmLlmError(
            f"task {name!r}: answers of {answer} tokens leave none of max_length {encoder.max_length} for prompts. "
            "Raise max_length, or set max_new_tokens to cut long answers."
        )
    return encoder
