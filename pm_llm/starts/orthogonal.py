"""Orthogonal: as the adapter was last trained, with A replaced by an orthonormal basis of its rows (SLAO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel

from pm_llm.adapters.adapter import Adapter, check_rank
from pm_llm.adapters.live import TASK, lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.families.base import Family
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start, train_further


@dataclass
class Orthogonal(Start):
    """Train `W0 + B A` from `B = B*_{t-1}` and `A = Q'`, with `A*_{t-1}' = Q R` and the diagonal of R positive.

    SLAO's start; method.md and the paper's summary give the formula, its code is not public (uncertain: whether R goes
    into B; here, as written, it does not, so the new task begins at another function than the last one ended at).
    """

    begins = "last"
    stands_on = "base"

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        if last is not None:
            last = last.replace_factors({name: _orthogonal(x) for name, x in last.factors.items()})
        model = train_further(model, last, lora, family)
        check_rank(lora_layers(model), TASK, "start orthogonal: a basis")
        return model


def _orthogonal(x: LowRank) -> LowRank:
    q, r = torch.linalg.qr(x.A.double().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return LowRank(x.B, (q * signs).T.to(x.A.dtype).contiguous())
