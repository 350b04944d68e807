"""Raw text on decoders (continued pretraining): a row is a document, and all of it is learnt.

A document that is longer than `max_length` is cut into pieces, each of which begins with the last token of the one
before, so that every token but the first is said once. Pieces are packed into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.evaluation.generate import evaluating, is_prompt_learning
from pm_llm.families.base import Row
from pm_llm.families.decoder import Decoder
from pm_llm.sections import EvaluationSection
from pm_llm.system.processes import process_state

if TYPE_CHECKING:
    from pm_llm.tasks.base import Example, Task
    from pm_llm.tasks.encoding import Encoder

LOGITS = 2**27  # of one batch, 512 MiB in float32


class Text(Decoder):
    """A document's tokens, from the one that texts begin with to the end of sequence."""

    kind = "text"
    packs = True

    def answer_length(self, encoder: Encoder, rows: Iterable[Example], most: int | None) -> int:
        return 1

    def features(self, encoder: Encoder, examples: Sequence[Example]) -> list[Row]:
        return [piece for row in examples for piece in self.pieces(encoder, row)]

    def pieces(self, encoder: Encoder, example: Example) -> list[Row]:
        """A document as training rows."""
        ids, size = self.document(encoder, example), encoder.max_length
        if size < 2:
            raise PmLlmError(f"max_length is {size}; raw text needs at least 2. Raise it.")
        cuts = range(0, max(len(ids) - 1, 1), size - 1)
        return [{"input_ids": ids[at : at + size], "labels": [-100, *ids[at + 1 : at + size]]} for at in cuts]

    def document(self, encoder: Encoder, example: Example) -> list[int]:
        """A document's tokens. It begins as the tokenizer begins a text, else with its begin or end of sequence, so
        that the first token that is the text's own is said after something."""
        tokenizer = encoder.tokenizer
        ids = self.open_prompt(encoder.whole(example.completion), tokenizer.eos_token_id)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = eos if bos is None else bos
        return [*([] if ids[:1] == [first] else [first]), *ids, eos]

    def parts(self, encoder: Encoder, example: Example) -> list[tuple[list[int], bool]]:
        """Of the whole document: its pieces share a token each."""
        ids = self.document(encoder, example)
        return [(ids[:1], False), (ids[1:], True)]

    def draw(self, model: Any, encoder: Encoder, rows: Sequence[Row], seed: int, how: EvaluationSection) -> list[Row]:
        """The same documents; what is said at each position is drawn from the model."""
        device, found = model.device, []
        generator = torch.Generator(device="cpu").manual_seed(seed)
        collate = self.collator(encoder.tokenizer, model)
        with torch.inference_mode(), evaluating(model):
            for row in rows:
                batch = collate([row]).to(device)
                inputs = {key: x for key, x in batch.items() if key != "labels"}
                chances = model(**inputs, use_cache=False).logits[0, :-1].float().softmax(-1).cpu()
                said = [-100, *torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()]
                labels = [y if x != -100 else -100 for x, y in zip(row["labels"], said, strict=True)]
                found.append({**row, "labels": labels})
        return found

    def predict(
        self,
        model: Any,
        encoder: Encoder,
        task: Task,
        how: EvaluationSection,
        progress: Callable[[int], Any] | None = None,
    ) -> tuple[list[Any], list[list[Any]]]:
        """Each document's negative log-likelihood in nats; and its tokens and bytes."""
        if is_prompt_learning(model):
            raise PmLlmError("adapters of virtual tokens cannot be scored on raw text. Use a LoRA adapter.")
        pieces = [(i, piece) for i, row in enumerate(task.test) for piece in self.pieces(encoder, row)]
        lengths = [len(piece["input_ids"]) for _, piece in pieces]
        vocabulary = model.get_input_embeddings().num_embeddings
        budget = min(how.batch_tokens, max(1, LOGITS // vocabulary))
        collate = self.collator(encoder.tokenizer, model)

        def losses(batch: Sequence[int]) -> list[float]:
            rows = collate([pieces[i][1] for i in batch]).to(process_state().device)
            found: list[float] = self.each(model, rows).tolist()
            return found

        with torch.inference_mode(), evaluating(model):
            found = in_batches(pack(lengths, 0, how.batch_size, budget), losses, model=model)
        sums, tokens = [0.0] * len(task.test), [0] * len(task.test)
        for (i, piece), loss in zip(pieces, found, strict=True):
            sums[i] += loss
            tokens[i] += len(piece["labels"]) - 1
        if progress is not None:
            progress(len(task.test))
        sizes = [len(row.completion.encode()) for row in task.test]
        return sums, [[n, size] for n, size in zip(tokens, sizes, strict=True)]
