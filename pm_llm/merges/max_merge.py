"""Max: of the entries that agree with the elected sign, the largest (the merge of PS-LoRA, arXiv 2512.08960)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pm_llm.merges.stored import Stored


@dataclass
class Max(Stored):
    """Each entry's sign is that of the sum of the task vectors; its value the one of largest magnitude with that sign.

    The paper's merge goes by magnitude; how it elects the sign is not settled by what is public (a choice, as in
    TIES). Its penalties on turning signs while training are not part of the merge.
    """

    def combine(self, name: str, vectors: list[Tensor]) -> Tensor:
        stack = torch.stack(vectors)
        sign = stack.sum(dim=0).sign()
        agreeing = stack * (stack.sign() == sign)
        return sign * agreeing.abs().amax(dim=0)
