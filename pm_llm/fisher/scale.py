"""One scale for the Fishers of several tasks."""

from __future__ import annotations

from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher


def scale_of(fisher: Fisher, scale: str, own: float) -> float:
    """What to divide a task's Fisher by, to put it on a common scale.

    `raw`: 1 (the paper). `trace`: the mean of the diagonal becomes 1. `own`: the task's own quadratic
    `Delta' F Delta` becomes 1. `measured`: `1/2 Delta' F Delta` becomes that of the parabola along the task vector
    with the losses L0 and L1 that were measured at its two ends on the task's own rows, and the slope g at its end:
    `1/2 q = L0 - L1 + g`. Where training reached the minimum, g is 0 and this is all that training took away; where it
    only began, the loss is nearly a line and has little curvature to protect. It is at least a hundredth of the loss
    before (a choice), or such a task would have no place in the sum. A task that was known to the end before it was
    trained (its loss, or its Fisher, is exactly 0) is taken as it is: its quadratic is nothing to the others.

    Args:
        fisher: The task's Fisher.
        scale: One of the four.
        own: `Delta' F Delta` of the task vector, over all modules.

    Raises:
        PmLlmError: If the scale is unknown, what it needs was not measured, or what it divides by is not positive.
    """
    if scale == "raw":
        return 1.0
    size: float = own
    if scale == "trace":
        size = sum(f.trace() for f in fisher.modules.values()) / sum(f.count() for f in fisher.modules.values())
    elif scale not in ("own", "measured"):
        raise PmLlmError(f"fisher_scale is {scale!r}; it must be raw, trace, own or measured.")
    if scale == "measured":
        if fisher.losses is None:
            raise PmLlmError("fisher_scale 'measured' needs the loss before and after training; give Fisher(losses=).")
        before, after = fisher.losses
        bend = max(before - after + sum(fisher.slopes.values()), before / 100)
        if size == 0 or bend == 0:
            return 1.0
        size = size / (2 * bend)
    if not 0 < size < float("inf"):
        raise PmLlmError(
            f"fisher_scale {scale!r}: the value to divide by is {size}. The adapter did not move or diverged, or "
            "the task was known without it."
        )
    return size
