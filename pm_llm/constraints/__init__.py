"""Constraints: what training a task adds to the plain step. They compose; each is one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pm_llm.lowrank import LowRank

if TYPE_CHECKING:
    from pm_llm.merges import Merge


@dataclass(frozen=True)
class Step:
    """Where training stands: what a constraint may depend on, so that a resumed run repeats it exactly.

    `step` counts optimizer steps from 0; `micro_step` counts the forward passes accumulated within it, out of
    `micro_steps`; `rank` is the data-parallel process out of `world_size`.
    """

    seed: int
    step: int
    micro_step: int = 0
    micro_steps: int = 1
    rank: int = 0
    world_size: int = 1


class Constraint:
    """The hooks a constraint can fill. The defaults constrain nothing.

    `space` is what :meth:`scale` scales: in `weights` the task adapter's update B A, in `factors` the way that A and
    that B have gone since training began.
    """

    space = "weights"

    def prepare(self, running: Mapping[str, LowRank], merge: Merge) -> None:
        """Before a task: the running adapter (empty before the first), and the merge rule with what it remembers."""

    def scale(self, step: Step) -> float:
        """The factor on the task adapter during this forward and backward pass."""
        return 1.0

    def penalty(self, live: Mapping[str, LowRank]) -> Tensor | None:
        """What to add to the loss of an optimizer step (0-dim), from each module's live (s B, A); None: nothing."""
        return None

    def observe(self, step: Step, loss: Tensor) -> None:
        """Take note of the loss (0-dim tensor, mean over answer tokens) of the pass that has just run."""

    def state(self) -> dict[str, list[Tensor]]:
        """This process's sums; they are added over all processes before :meth:`logs` reads them."""
        return {}

    def load_state(self, state: dict[str, list[Tensor]]) -> None:
        """The inverse of :meth:`state`, when training goes on from a checkpoint."""

    def logs(self, state: dict[str, list[float]]) -> dict[str, float]:
        """What to add to the Trainer's log line, from :meth:`state` summed over processes."""
        return {}
