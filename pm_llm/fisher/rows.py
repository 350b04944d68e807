"""The rows of a task that its curvature is measured on, shared out over the processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.families.base import Family, Row, family_of
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.measure import Batch, sum_fisher, sum_loss
from pm_llm.fisher.slopes import sum_slopes
from pm_llm.sections import FisherSection
from pm_llm.system.mapped import Zeros
from pm_llm.system.processes import process_state, total
from pm_llm.system.progress import bar


class ChosenRows:
    """Some of a task's training rows, the same whenever they are chosen; every example counts once.

    Args:
        task: The task's name, for the progress bar.
        rows: The task's encoded rows.
        config: How many, and how many at once.
        seed: Of the choice.
        tokenizer: For padding.
        family: Of the rows: their batches, and their loss.
    """

    def __init__(
        self, task: str, rows: Sequence[Row], config: FisherSection, seed: int, tokenizer: Any, family: Family
    ) -> None:
        self.task, self.size, self.tokenizer, self.state = task, config.batch_size, tokenizer, process_state()
        self.family = family
        self._take([rows[i] for i in drawn(len(rows), config.samples, seed)])

    def _take(self, rows: list[Row]) -> None:
        mine = rows[self.state.process_index :: self.state.num_processes]
        # of like lengths together: less padding
        self.rows, self.count, self.mine = rows, len(rows), sorted(mine, key=self.family.length)

    def answered(self, rows: list[Row]) -> ChosenRows:
        """The same with other answers: encoded rows in the order of :attr:`rows`."""
        found = copy(self)
        found._take(rows)
        return found

    def fisher(
        self,
        model: Any,
        form: str,
        direction: dict[str, LowRank] | None = None,
        loss_before: float | None = None,
        zeros: Zeros = torch.zeros,
    ) -> Fisher:
        """The Fisher, see :func:`pm_llm.fisher.measure.sum_fisher`; `loss_before` is what :meth:`loss` was."""
        with bar(len(self.mine), f"Fisher {self.task}", "row") as progress:
            sums = sum_fisher(model, self.batches(model), form, direction, progress.update, zeros, self.family)
        for tensor in sums.tensors() if self.state.num_processes > 1 else ():
            tensor.copy_(total(tensor))
        return sums.mean(self.count, loss_before)

    def loss(self, model: Any) -> float:
        """The mean loss over the rows, in nats an example."""
        found, _ = sum_loss(model, self.batches(model), self.family)
        return float(total(torch.tensor(found, dtype=torch.float64))) / self.count

    def slopes(self, model: Any, towards: Sequence[Mapping[str, LowRank]]) -> list[float]:
        """The derivatives of the mean loss towards given adapters, see :mod:`pm_llm.fisher.slopes`."""
        return (total(sum_slopes(model, self.batches(model), towards, self.family)) / self.count).tolist()

    def one_by_one(self, model: Any) -> Iterator[Batch]:
        """This process's rows, each a batch of its own, without padding."""
        collate = self.family.collator(self.tokenizer, model)
        for row in self.mine:
            yield collate([row]).to(self.state.device)

    def batches(self, model: Any) -> Iterator[Batch]:
        """This process's rows, `fisher.batch_size` at a time."""
        collate = self.family.collator(self.tokenizer, model)
        for at in range(0, len(self.mine), self.size):
            yield collate(self.mine[at : at + self.size]).to(self.state.device)


def measure(
    model: Any,
    rows: Any,
    tokenizer: Any,
    form: str = "factored",
    samples: int = 128,
    batch_size: int = 4,
    seed: int = 0,
    max_length: int = 512,
    direction: dict[str, LowRank] | None = None,
    loss_before: float | None = None,
    beta: float = 0.1,
) -> Fisher:
    """The Fisher of one task's rows, for a loop of one's own: what `Merger("optimal").fold` takes.

    It is the mean over rows of the squared gradient of a row's loss, summed over its answer tokens, with respect to
    the weights that the trainable adapter changes (not its factors), at the weights that the model has.

    Args:
        model: A PeftModel with one trainable LoRA adapter, trained or not.
        rows: What was trained on: a dataset or list with `input_ids` and `labels` (or `completion_mask`), as
            `trainer.train_dataset` of TRL's SFTTrainer has them, or a :class:`pm_llm.tasks.base.Task`.
        tokenizer: The model's, for padding.
        form: `factored`, `dense`, `kronecker` or `factors`: what the merge rule works with.
        samples: How many rows are drawn.
        batch_size: Rows a forward pass.
        seed: Of the draw.
        max_length: Longest row in tokens, where `rows` is a task.
        direction: A task vector by module, along which the exact curvature is measured too.
        loss_before: The mean loss before training, for rules that measure by what was gained (`fisher_scale:
            measured`): :func:`mean_loss` of the same rows and seed gives it.
        beta: DPO's, of preference pairs (`trainer.train_dataset` of a `ContinualDPOTrainer`).

    Raises:
        PmLlmError: If there is no row, or a row has neither labels nor an answer.
    """
    chosen = _chosen(model, rows, tokenizer, samples, batch_size, seed, max_length, beta)
    return chosen.fisher(model, form, direction, loss_before)


def mean_loss(
    model: Any,
    rows: Any,
    tokenizer: Any,
    samples: int = 128,
    batch_size: int = 4,
    seed: int = 0,
    max_length: int = 512,
    beta: float = 0.1,
) -> float:
    """The mean loss (nats a row) on the rows that :func:`measure` draws; arguments as there."""
    return _chosen(model, rows, tokenizer, samples, batch_size, seed, max_length, beta).loss(model)


def _chosen(
    model: Any, rows: Any, tokenizer: Any, samples: int, batch_size: int, seed: int, max_length: int, beta: float
) -> ChosenRows:
    from pm_llm.tasks.base import Task, picked
    from pm_llm.tasks.encoding import encoder_for

    family = family_of(model)
    if isinstance(rows, Task):
        if rows.kind == "preference":
            raise PmLlmError(
                "the Fisher of preference pairs needs what the model before the task gave both answers. Give "
                "trainer.train_dataset of a ContinualDPOTrainer."
            )
        encoder = encoder_for(tokenizer, family.of(rows.kind), rows, max_length, None)
        family = encoder.family
        taken = encoder.features(picked(rows.train, drawn(len(rows.train), samples, seed)))
    elif not len(rows):
        raise PmLlmError("there is no row to measure the Fisher on.")
    else:
        taken = [_labelled(rows[i]) for i in drawn(len(rows), samples, seed)]
        family = family.of("preference", beta) if "chosen_ids" in taken[0] else family
    return ChosenRows("rows", taken, FisherSection(samples=samples, batch_size=batch_size), seed, tokenizer, family)


def _labelled(row: Mapping[str, Any]) -> Row:
    if row.keys() >= {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}:
        return dict(row)
    if "input_ids" not in row or not ({"labels", "completion_mask"} & row.keys()):
        raise PmLlmError(
            f"a row has {', '.join(map(str, row))}; it needs input_ids and labels (or completion_mask), as "
            "trainer.train_dataset has. Or give a Task."
        )
    ids, block = list(row["input_ids"]), {"seq_lengths": row["seq_lengths"]} if row.get("seq_lengths") else {}
    if "labels" in row:
        return {"input_ids": ids, "labels": list(row["labels"]), **block}
    said = [i if mask else -100 for i, mask in zip(ids, row["completion_mask"], strict=True)]
    return {"input_ids": ids, "labels": said, **block}


def drawn(count: int, most: int, seed: int) -> list[int]:
    """Numbers of at most `most` of `count` rows, drawn by a seed."""
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()
    return found
