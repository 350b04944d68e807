"""What constraints share that keep A off the span of what past tasks used, by a basis for each module."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pm_llm.constraints.base import ANEW, Constraint


class Spans(Constraint):
    """`bases` holds orthonormal rows (k, d_in) a module; after a task they hold `share` of the squared norm of what it
    used, in at most `most` of the d_in dimensions. `called` is the constraint's name."""

    share: float
    most: float
    bases: dict[str, Tensor]
    called: ClassVar[str]
    from_zero = True
    anew = ANEW

    def memory(self) -> dict[str, Tensor]:
        return {name: basis.cpu() for name, basis in self.bases.items()}

    def remembers(self, n: int, m: int, r: int) -> int:
        return int(self.most * m) * m

    def load_memory(self, memory: dict[str, Tensor]) -> None:
        self.bases = dict(memory)
