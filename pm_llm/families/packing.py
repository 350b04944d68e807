"""Several rows in one: nothing is padded, and each row sees itself alone.

Positions begin at 0 with each row. Transformers makes of that an attention in which no token sees another row's
(:func:`transformers.masking_utils.find_packed_sequence_indices`), for models and attention implementations that heed
it; whether a model does is tried, as not all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import BatchEncoding, DataCollatorForSeq2Seq

from pm_llm.errors import PmLlmError
from pm_llm.families.base import Batch, Family, Row
from pm_llm.families.rows import TableRows, table_of

LENGTHS = "seq_lengths"  # of the rows in a block, in tokens; TRL's name
_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # a model's answers to takes_packing


def packed(rows: Dataset, length: int) -> Dataset:
    """The rows in blocks of at most `length` tokens, by best fit (arXiv 2404.10830); none of them is cut.

    The first token of a row is never learnt: what would say it is the end of another row.
    """
    from trl import pack_dataset

    def singly(some: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        lengths = some.get(LENGTHS) or [None] * len(some["input_ids"])
        for ids, labels, own in zip(some["input_ids"], some["labels"], lengths, strict=True):
            at = 0
            for size in own or [len(ids)]:  # of a block each row by itself
                found["input_ids"].append(ids[at : at + size])
                found["labels"].append([-100, *labels[at + 1 : at + size]])
                at += size
        return found

    return pack_dataset(rows.map(singly, batched=True, remove_columns=rows.column_names), length, "bfd")


def blocks(rows: Sequence[Row], length: int, model: Any) -> Sequence[Row]:
    """The rows in blocks, where the model takes them; else as they are."""
    if not takes_packing(model):
        return rows
    found = packed(table_of(rows), length)
    return TableRows(found) if isinstance(rows, TableRows) else found.to_list()


def check_packing(model: Any, family: Family) -> None:
    """Raise PmLlmError if such rows, which `train.packing` asks for, cannot be packed for a model."""
    if family.task_type != "CAUSAL_LM" or family.kind == "preference":
        what = "preference pairs" if family.kind == "preference" else "rows of an encoder-decoder"
        raise PmLlmError(f"train.packing: {what} cannot be packed. Leave it out.")
    if not takes_packing(model):
        raise PmLlmError(
            "train.packing: this model does not tell apart rows in one block, with the attention that it has. Leave "
            "packing out, or choose attn_implementation sdpa or eager."
        )


class Packing:
    """A collator that also takes blocks: they are padded as rows are, with positions in place of a mask.

    Padding has the position 0 throughout, so that each of its tokens is by itself.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.plain = DataCollatorForSeq2Seq(tokenizer, model)
        self.pad = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        lengths = [row.get(LENGTHS) or [len(row["input_ids"])] for row in rows]
        if not any(row.get(LENGTHS) for row in rows):
            return self.plain([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
        positions = [[at for n in one for at in range(n)] for one in lengths]
        columns = (("input_ids", self.pad), ("labels", -100))
        found = {key: _padded([row[key] for row in rows], value) for key, value in columns}
        return BatchEncoding({**found, "position_ids": _padded(positions, 0)})


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], batch_first=True, padding_value=value)


def no_padding(batch: Batch) -> Tensor | None:
    """Which positions (batch, tokens) of blocks are no padding; None where there are no blocks."""
    if "position_ids" not in batch or "attention_mask" in batch:
        return None
    at = batch["position_ids"]
    after = torch.nn.functional.pad(at[:, 1:], (0, 1))
    return (at != 0) | (after == 1)


def takes_packing(model: Any) -> bool:
    """Whether rows in a block come out as they do alone. It is tried: the model may not tell rows apart (no positions,
    or an attention of its own), and flash attention does for a batch of one block only."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner not in _KNOWN:
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                _KNOWN[inner] = _same_in_blocks(model)
        except (TypeError, ValueError, RuntimeError):  # of positions that it does not take
            _KNOWN[inner] = False
        finally:
            model.train(was_training)
    return _KNOWN[inner]


def _same_in_blocks(model: Any) -> bool:
    size = min(9, model.get_input_embeddings().num_embeddings)
    ids = torch.arange(size, device=model.device)
    cut = size // 3
    alone = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in (ids[:cut], ids[cut:])])
    positions = torch.cat([torch.arange(cut), torch.arange(size - cut)]).to(ids.device)
    blocks = model(
        input_ids=ids.expand(2, -1), position_ids=positions.expand(2, -1).contiguous(), use_cache=False
    ).logits
    scale = alone.abs().max().clamp(min=1e-6)
    return bool((blocks - alone).abs().max() < (1e-3 if model.dtype == torch.float32 else 0.05) * scale)
