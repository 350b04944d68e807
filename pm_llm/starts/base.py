"""What a start is: the protocol, and what it stands on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import PeftModel

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import RUNNING, TASK, lora_layers, remove, set_active
from pm_llm.families.base import Family
from pm_llm.families.models import add_task_adapter
from pm_llm.methods import name_of_choice
from pm_llm.sections import LoraSection
from pm_llm.system.options import check_options

if TYPE_CHECKING:
    from pm_llm.fisher.rows import ChosenRows


class Start:
    """Prepares the model for a task: exactly one trainable adapter, named `TASK`.

    `begins` says which function the model has before the task is trained: that of the `merged` adapter, of the one
    that was trained `last`, or of the `base` model. `stands_on` says what the trained adapter is a change of: the
    `running` adapter (which is active too, frozen, under the name `RUNNING`), or the `base` model.
    """

    begins: Literal["merged", "last", "base"] = "merged"
    stands_on: Literal["running", "base"] = "running"
    keeps_coordinates = False  # whether A and B begin as those that were merged, or trained, last
    offset = False  # whether the trained adapter begins at an update that is not zero, taken back elsewhere

    def __post_init__(self) -> None:
        check_options(self, f"{name_of_choice(self)}: ")

    @property
    def anew(self) -> bool:
        """Whether the task's adapter is a new one, on the running one or alone."""
        return self.stands_on == "running" or self.begins == "base"

    def name(self) -> str:
        """What the configuration calls it."""
        return name_of_choice(self)

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        """`model` (a base model before the first task) with its adapters in place, active and trainable."""
        raise NotImplementedError

    def look(self, model: PeftModel, chosen: ChosenRows) -> None:
        """After :meth:`prepare`, with some of the task's rows at hand."""

    def as_update(self, new: Adapter) -> Adapter:
        """The trained adapter as what it changes in the model it began at."""
        return new

    def as_live(self, update: Adapter) -> Adapter:
        """The inverse: what must be live in a prepared model for that change."""
        return update


def train_further(model: PeftModel, adapter: Adapter | None, lora: LoraSection, family: Family) -> PeftModel:
    """`model` with one adapter, to be trained: a fresh one, or from where `adapter` is, at the same learning rate.

    The scaling matters: with Adam a step moves W by `scaling` times the learning rate, and an adapter here comes with
    its scaling folded in. Without unfolding it, every task but the first would train at another rate.
    """
    model = add_task_adapter(model, lora, family, TASK)
    remove(model, RUNNING)
    if adapter is not None:
        scaling = {name: layer.scaling[TASK] for name, layer in lora_layers(model).items()}
        adapter.attach(model, TASK, lora.lora_dropout, scaling)
    set_active(model, [TASK], trainable=TASK)
    return model
