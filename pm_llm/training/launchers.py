"""What a method asks of a process that a launcher does not leave it."""

from __future__ import annotations

from collections.abc import Sequence

from pm_llm.constraints.base import UPDATE, WHOLE, Constraint
from pm_llm.errors import PmLlmError
from pm_llm.methods import Method
from pm_llm.system.sharing_out import is_asked


def refuse_sharding(constraints: Sequence[Constraint], sharded: bool, deepspeed: bool) -> None:
    """Raise PmLlmError if a constraint needs what a process does not have.

    Args:
        constraints: The constraints.
        sharded: Whether what is trained is shared out (ZeRO-3, or FSDP2 around a Trainer of one's own).
        deepspeed: Whether DeepSpeed runs the step.
    """
    # a part of the adapter cannot be gathered between a forward and its backward
    inside = [c for c in constraints if c.space == "factors" or c.fills("penalty", "loss", *WHOLE)]
    updating = any(c.fills(*UPDATE) for c in constraints)
    if sharded and inside:
        names = ", ".join(type(c).__name__ for c in inside)
        raise PmLlmError(
            f"{names} needs the whole adapter in every process. Use ddp.yaml or fsdp2.yaml"
            f"{'' if updating else ' or zero2.yaml'}."
        )
    if deepspeed and updating:
        names = ", ".join(type(c).__name__ for c in constraints if c.fills(*UPDATE))
        raise PmLlmError(
            f"{names} takes part in each optimizer step, which DeepSpeed makes by itself. Use ddp.yaml or fsdp2.yaml."
        )


def refuse_shared_out(method: Method) -> None:
    """Raise PmLlmError where models are to be shared out and a method works on the base model's own weights."""
    constraints = [choice.build("constrain") for choice in method.constrain]
    names = [type(one).__name__ for one in constraints if one.trains_weights]
    names += ["Subspace"] if method.start.build("start").offset else []
    if names and is_asked():
        raise PmLlmError(f"{', '.join(names)} needs the base model's whole weights in every process. Use ddp.yaml.")
