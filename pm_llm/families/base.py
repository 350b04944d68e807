"""What a family is: all that depends on what a training row is for a kind of model, and on nothing else.

A family says how a row's prompt and answer become tokens, which loss they are trained and measured by, which Trainer
trains them, and how the model answers. Methods know nothing of it. A new family is a file beside this one and a line
in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pm_llm.errors import PmLlmError

if TYPE_CHECKING:
    from pm_llm.evaluation.generate import Prompts
    from pm_llm.evaluation.likelihood import Reader
    from pm_llm.sections import EvaluationSection
    from pm_llm.tasks.base import Example, Task
    from pm_llm.tasks.encoding import Encoder

FAMILIES = {
    "decoder": "pm_llm.families.decoder:Decoder",
    "encoder_decoder": "pm_llm.families.encoder_decoder:EncoderDecoder",
}
# what a row is: a prompt with its answer, raw text, or a prompt with a better and a worse answer
KINDS = {"prompt": "prompts with answers", "text": "raw text", "preference": "preference pairs"}
Row = dict[str, Any]  # an encoded training row: `input_ids` and `labels`, or what else its family trains on
Batch = Mapping[str, Tensor]


class Family:
    """One kind of model and its rows.

    `kind` is the kind of rows, `packs` whether they are packed into blocks in any case, `refused` are fields of the
    Trainer's arguments that `train.extra` must not set. `task_type` is PEFT's word for it, `padding_side` where
    prompts are padded when they are answered, `shares_prompts` whether tokens that prompts begin with in common can be
    read once, from a cache, `learns_turns` whether turns within a prompt can be learnt.
    """

    kind: ClassVar[str] = "prompt"
    packs: ClassVar[bool] = False
    refused: ClassVar[frozenset[str]] = frozenset()
    task_type: ClassVar[str]
    padding_side: ClassVar[str]
    shares_prompts: ClassVar[bool] = False
    learns_turns: ClassVar[bool] = False

    # ---- the model ----
    def takes(self, config: Any) -> bool:
        """Whether a model of that configuration (transformers') is of this family. Raises PmLlmError if it is, but
        cannot be trained or scored here."""
        raise NotImplementedError

    def auto_class(self) -> Any:
        """Of transformers, that loads the model."""
        raise NotImplementedError

    def targets(self, model: Any) -> list[str]:
        """The modules that are adapted where the configuration names none."""
        return ["q_proj", "v_proj"]

    def prompt_reader(self, model: Any) -> Any:
        """The part of the model that gives a prompt's hidden states, `last_hidden_state`."""
        raise NotImplementedError

    # ---- rows ----
    def of(self, kind: str, beta: float = 0.1) -> Family:
        """The family of a kind of rows (of `KINDS`) on this kind of model; `beta` is that of preference pairs.

        Raises:
            PmLlmError: If this kind of model cannot be trained on such rows.
        """
        if kind == self.kind:
            return self
        raise PmLlmError(f"{KINDS[kind]} can be trained on decoders (LLaMA-like models) only.")

    def answer_length(self, encoder: Encoder, rows: Iterable[Example], most: int | None) -> int:
        """Tokens that answers may have: `most` if given, else those of the longest answer of some rows, with end of
        sequence."""
        if most is not None:
            return most
        seen: set[int] = set()
        longest = 0
        for row in rows:
            said = hash(row.completion)
            if said not in seen:
                seen.add(said)
                longest = max(longest, len(encoder.whole_answer(row)))
        return longest

    def features(self, encoder: Encoder, examples: Sequence[Example]) -> list[Row]:
        """Rows to train on."""
        return [self.row(prompt, encoder.answer(x), labels) for x in examples for prompt, labels in [encoder.asked(x)]]

    def length(self, row: Row) -> int:
        """Tokens of a training row."""
        return len(row["input_ids"])

    def parts(self, encoder: Encoder, example: Example) -> list[tuple[list[int], bool]]:
        """An example's tokens as they are trained, in pieces, with whether each is learnt."""
        (row,) = self.features(encoder, [example])
        pairs = zip(row["input_ids"], (label != -100 for label in row["labels"]), strict=True)
        return [([i for i, _ in some], learnt) for learnt, some in groupby(pairs, key=lambda pair: pair[1])]

    def carries(self, encoder: Encoder, example: Example) -> tuple[int, int]:
        """How many of an example's tokens carry loss, and how many there are."""
        parts = self.parts(encoder, example)
        return sum(len(ids) for ids, learnt in parts if learnt), sum(len(ids) for ids, _ in parts)

    def referenced(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> Sequence[Row]:
        """The rows with what the loss must know of the model before training."""
        return rows

    def draw(self, model: Any, encoder: Encoder, rows: Sequence[Row], seed: int, how: EvaluationSection) -> list[Row]:
        """The rows with what is learnt in them drawn from the model."""
        from pm_llm.evaluation.generate import answered

        return answered(model, encoder, [self.prompt_of(row) for row in rows], seed, how)

    def prompt_budget(self, max_length: int, max_new_tokens: int) -> int:
        """How many tokens a prompt may have."""
        raise NotImplementedError

    def row(self, prompt: list[int], answer: list[int], labels: list[int] | None = None) -> Row:
        """A training row; labels, which those of the prompt may be given of, are -100 where nothing is learnt."""
        raise NotImplementedError

    def prompt_of(self, row: Row) -> list[int]:
        """The prompt of a training row; :meth:`draw` answers it."""
        raise NotImplementedError

    def lead(self, example: Example) -> str:
        """What stands between prompt and answer."""
        return ""

    def open_prompt(self, ids: list[int], end: int) -> list[int]:
        """A prompt's tokens, after which the answer comes; `end` is the end of sequence."""
        return ids

    def answer_ids(self, encoder: Encoder, text: str, **how: Any) -> list[int]:
        """Token ids of an answer, of which the text is given with what leads to it."""
        return encoder.ids(text, **how)

    def seen_before(self, prompt: Sequence[int]) -> list[int]:
        """The tokens of a prompt after which an answer's are decoded."""
        return []

    # ---- training ----
    def collator(self, tokenizer: Any, model: Any) -> Callable[[Sequence[Row]], Any]:
        """What makes a batch of rows."""
        from transformers import DataCollatorForSeq2Seq

        found: Callable[[Sequence[Row]], Any] = DataCollatorForSeq2Seq(tokenizer, model)
        return found

    def trainer_class(self) -> Any:
        """Of the Trainer, which takes a `constraint=`."""
        raise NotImplementedError

    def arguments_class(self) -> Any:
        """Of that Trainer's arguments."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What these are for every task."""
        return {}

    def tokens(self, module: str, batch: Batch) -> Tensor | None:
        """Which positions (batch, tokens) of a module's input are no padding; None: all."""
        return batch["attention_mask"].bool() if "attention_mask" in batch else None

    # ---- the loss ----
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """What is trained, in nats, summed over examples (and answer tokens), so that they do not mix in the gradient;
        logits are made where an answer is said only.

        Raises:
            PmLlmError: If an example has no answer token.
        """
        if not bool((self.labels(batch) != -100).any(dim=1).all()):
            raise PmLlmError("an example has no answer token, so it has no Fisher. Check its completion.")
        logits, labels = self.answers(model, batch)
        return nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="sum")

    def each(self, model: Any, batch: Batch) -> Tensor:
        """The loss of each example, shape (batch,)."""
        logits, labels = self.answers(model, batch)
        return nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
        ).sum(dim=1)

    def examples(self, x: Tensor) -> Tensor:
        """What a module is given or gives (rows, tokens, width), with all tokens of an example together: (examples,
        tokens, width)."""
        return x

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (batch, tokens, vocabulary) of positions at which answer tokens are said, and these tokens' ids
        (batch, tokens), -100 where a row has none there."""
        raise NotImplementedError

    @contextmanager
    def listening(self, model: Any) -> Iterator[list[Any]]:
        """A context around a pass of the model; what :meth:`said` needs of it is put into the list."""
        raise NotImplementedError
        yield []

    def said(self, model: Any, heard: list[Any], batch: Batch) -> Tensor:
        """The logits (tokens, vocabulary) of a pass at the positions of :meth:`labels` that are not -100, row by row;
        no part of the network below its head is run again."""
        raise NotImplementedError

    def labels(self, batch: Batch) -> Tensor:
        """The ids (batch, tokens) of all positions at which something is said; -100 where nothing is learnt."""
        raise NotImplementedError

    # ---- answering ----
    def predict(
        self,
        model: Any,
        encoder: Encoder,
        task: Task,
        how: EvaluationSection,
        progress: Callable[[int], Any] | None = None,
    ) -> tuple[list[Any], list[list[Any]]] | None:
        """A prediction and its references for each test row, where these are no answers to prompts; else None."""
        return None

    def new_tokens(self, output: Tensor, inputs: Batch) -> Tensor:
        """What `generate` gives, without the prompt."""
        return output

    def reader(self, prompts: Prompts, rows: Sequence[int]) -> Reader:
        """Some prompts, read, for the likelihoods of answers to them."""
        raise NotImplementedError


@lru_cache
def family(name: str) -> Family:
    """A family by its name in `FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(importlib.import_module(module), attribute)()
    return found


def family_for(config: Any) -> Family:
    """That of a model's configuration. Raises PmLlmError if it is of none, or cannot be used."""
    for name in FAMILIES:
        if (one := family(name)).takes(config):
            return one
    raise PmLlmError(
        f"a {config.model_type!r} model is neither a decoder nor an encoder-decoder that generates text. Use a "
        "LLaMA-like or a T5-like model."
    )


def family_of(model: Any) -> Family:
    """That of a loaded model, also of one that :func:`family_for` would refuse for a run."""
    return family("encoder_decoder" if getattr(model.config, "is_encoder_decoder", False) else "decoder")
