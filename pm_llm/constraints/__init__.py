"""Constraints: what training a task adds to the plain step. They compose; each is one file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """The hooks a constraint can fill. The defaults constrain nothing."""

    def scale(self, step: Step) -> float:
        """The factor on the task adapter's update during this forward and backward pass."""
        return 1.0

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
