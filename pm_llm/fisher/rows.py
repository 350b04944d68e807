"""The rows of a task that its curvature is measured on, shared out over the processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from pm_llm.algebra.lowrank import LowRank
from pm_llm.config import FisherSection
from pm_llm.families.base import Family, Row
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.measure import Batch, sum_fisher, sum_loss
from pm_llm.fisher.slopes import sum_slopes
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
            tensor.copy_(total(tensor).cpu())
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


def drawn(count: int, most: int, seed: int) -> list[int]:
    """Numbers of at most `most` of `count` rows, drawn by a seed."""
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()
    return found
