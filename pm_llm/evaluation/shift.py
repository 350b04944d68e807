"""How far a model has gone from its base: in what it says on the new task's rows, and in its weights.

That forgetting follows the first of the two is claimed by Shenfeld et al. (arXiv 2509.04259): so they are recorded
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.evaluation.generate import evaluating
from pm_llm.fisher.rows import ChosenRows
from pm_llm.system.processes import total
from pm_llm.system.sharing_out import in_step

POSITIONS = 256  # whose probabilities are held at once


@torch.inference_mode()
def divergence(model: Any, chosen: ChosenRows) -> float | None:
    """`KL(p || q)` in nats, mean over the answer tokens of the rows, with p the base model's distribution over the
    vocabulary and q that of the model with its active adapters; None for preference pairs, which have two answers.

    Args:
        model: A PeftModel.
        chosen: The rows; each process has its share, and all get the mean of all.
    """
    if chosen.family.kind == "preference":
        return None
    sums = torch.zeros(2, device=chosen.state.device)
    with evaluating(model), in_step(model):
        for batch in chosen.batches(model):
            logits, labels = chosen.family.answers(model, batch)
            with model.disable_adapter():
                before, _ = chosen.family.answers(model, batch)
            said = labels != -100
            sums += torch.stack([_kl(before[said], logits[said]), said.sum()]).to(sums.device)
    nats, tokens = total(sums).tolist()
    return float(nats / tokens)


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """The sum over positions, shapes (positions, vocabulary)."""
    found = before.new_zeros((), dtype=torch.float32)
    for x, y in zip(before.split(POSITIONS), after.split(POSITIONS), strict=True):
        p, q = x.float().log_softmax(-1), y.float().log_softmax(-1)
        found += (p.exp() * (p - q)).sum()
    return found


def norm(update: Mapping[str, LowRank]) -> float:
    """The Frobenius norm of an update over all its modules."""
    return sqrt(sum(max(0.0, lowrank.inner(x, x)) for x in update.values()))
