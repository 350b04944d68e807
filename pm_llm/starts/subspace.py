"""Subspace: a new adapter in a subspace of the weights or of the task's inputs (PiSSA, OLoRA, CorDA, EVA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import corda
from peft.tuners.lora.config import CordaConfig
from transformers.pytorch_utils import Conv1D

from pm_llm.adapters.adapter import Adapter, check_rank
from pm_llm.adapters.live import RUNNING, TASK, lora_layers, set_active
from pm_llm.algebra import lowrank
from pm_llm.algebra.bases import leading
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.families.base import Family
from pm_llm.families.models import add_task_adapter
from pm_llm.fisher.inputs import pass_rows, second_moments
from pm_llm.fisher.rows import ChosenRows
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start
from pm_llm.system.processes import total

INITS = ("pissa", "olora", "corda", "eva")  # PEFT's names; all but the last begin with an update that is not zero


@dataclass
class Subspace(Start):
    """Train `W0 + M_{t-1} - s B0 A0 + s B A` from `(B, A) = (B0, A0)`.

    `pissa` takes (B0, A0) from the leading singular directions of W0 (arXiv 2404.02948), `olora` from its QR factors
    (arXiv 2406.01775), as PEFT makes them. PEFT puts `- s B0 A0` into the base weights. Here these stay as they are:
    it goes into the frozen running adapter while the task trains, and the task vector is `s B A - s B0 A0`, of twice
    the rank. `corda` takes `B0 A0 s = [W0 C]_r C^-1`, where `[.]_r` keeps the r leading singular directions and C is
    the second moments of the task's inputs, each row of which PEFT divides by its largest entry, and damps them by a
    hundredth (arXiv 2406.05223, its instruction-previewed mode; the other mode wants rows of the knowledge to be kept,
    and old rows are gone). That takes `4 d_in^2` bytes a module, of all modules at once, where the model is. `eva`
    takes A0 from the principal directions of the task's inputs, with B0 = 0 (arXiv 2410.07170); they come from second
    moments, because PEFT's loop does not end on rows with fewer tokens than the rank, and no ranks are moved between
    modules. Inputs are those of the rows that the Fisher is measured on.

    Args:
        init: `pissa`, `pissa_niter_N` (a fast SVD in N steps), `olora`, `corda` or `eva`.

    Raises:
        PmLlmError: If there is no such initialisation, PEFT cannot make it of these base weights, or a rank is more
            than a module has directions.
    """

    init: str = "pissa"
    _origin: dict[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    _running: Adapter | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        name, _, steps = self.init.partition("_niter_")
        if self.init not in INITS and not (name == "pissa" and steps.isdigit()):
            raise PmLlmError(f"subspace: init is {self.init!r}; it must be {', '.join(INITS)} or pissa_niter_N.")
        self.offset = name != "eva"

    def prepare(
        self, model: PeftModel, running: Adapter | None, lora: LoraSection, family: Family, last: Adapter | None = None
    ) -> PeftModel:
        model = add_task_adapter(model, lora, family, TASK)
        check_rank(lora_layers(model), TASK, f"start subspace: {self.init}", outputs=self.offset)
        self._running, self._origin = running, {}
        if self.offset and self.init != "corda":
            self._initialise(model)
        self._freeze(model)
        return model

    def look(self, model: PeftModel, chosen: ChosenRows) -> None:
        layers = lora_layers(model)
        if self.init == "corda":
            _measure(model, layers, chosen)
            self._initialise(model)
            self._freeze(model)
        if self.init != "eva":
            return
        for name, moments in second_moments(model, layers, chosen).items():
            weight: Any = layers[name].lora_A[TASK].weight
            with torch.no_grad():
                weight.copy_(leading(moments)[1][: len(weight)].to(weight))

    def as_update(self, new: Adapter) -> Adapter:
        if not self._origin:
            return new
        change = {n: lowrank.add(x, self._origin[n].scale(-1.0)) for n, x in new.factors.items()}
        return new.replace_factors(change)

    def as_live(self, update: Adapter) -> Adapter:
        if not self._origin:
            return update
        return update.replace_factors({n: lowrank.add(x, self._origin[n]) for n, x in update.factors.items()})

    def _freeze(self, model: PeftModel) -> None:
        """The frozen adapter: the running one, less what the new one begins with."""
        frozen = self._running
        if self._origin:
            minus = {name: x.scale(-1.0) for name, x in self._origin.items()}
            base = Adapter.from_model(model, TASK) if frozen is None else frozen
            past = {} if frozen is None else frozen.factors
            frozen = base.replace_factors({n: lowrank.add(past[n], x) if past else x for n, x in minus.items()})
        if frozen is not None:
            frozen.attach(model, RUNNING)
        set_active(model, [TASK] if frozen is None else [RUNNING, TASK], trainable=TASK)

    def _initialise(self, model: PeftModel) -> None:
        """A and B as PEFT makes them; the base weights stay, and what PEFT takes from them is remembered."""
        for name, layer in lora_layers(model).items():
            try:
                with _kept(layer):
                    if self.init.startswith("pissa"):
                        layer.pissa_init(TASK, self.init)
                    elif self.init == "corda":
                        layer.corda_init(TASK, self.init)
                    elif isinstance(layer.get_base_layer(), Conv1D):
                        raise ValueError("the module is a Conv1D, whose weight PEFT would take for its transpose")
                    else:
                        layer.olora_init(TASK)
            except (TypeError, ValueError) as error:
                raise PmLlmError(f"start subspace: PEFT cannot make {self.init!r} of {name}: {error}") from error
            for side in (layer.lora_A, layer.lora_B):
                side[TASK].weight.data = side[TASK].weight.data.float()
            weights: Any = (layer.lora_A[TASK].weight, layer.lora_B[TASK].weight)
            a, b = (w.detach().clone() for w in weights)
            self._origin[name] = LowRank((b * layer.scaling[TASK]).cpu(), a.cpu())


def _measure(model: PeftModel, layers: dict[str, Any], chosen: ChosenRows) -> None:
    """Leave at every base layer the `eigens` that PEFT's CorDA begins with, of the rows of all processes."""
    if chosen.count < chosen.state.num_processes:
        raise PmLlmError(
            f"start subspace: corda needs a row for each of {chosen.state.num_processes} processes, fisher.samples or "
            f"the task gives {chosen.count}. Give more."
        )
    ranks = {f"{name}.base_layer": layer.r[TASK] for name, layer in layers.items()}
    settings = CordaConfig(corda_method="ipm", verbose=False)
    config = LoraConfig(
        target_modules=list(ranks), rank_pattern=ranks, init_lora_weights="corda", corda_config=settings
    )

    linears: list[Any] = [layer.get_base_layer() for layer in layers.values()]
    was_training, hooks = model.training, [dict(linear._forward_hooks) for linear in linears]
    try:
        corda.calib_cov_distribution(model, config, lambda: pass_rows(model, chosen), None, None)
        for linear, rank in zip(linears, ranks.values(), strict=True):
            linear.covariance_matrix = total(linear.covariance_matrix * linear.sample_count) / chosen.count
            linear.rank, linear.corda_method = rank, settings.corda_method
        corda.collect_eigens(model, config, False)
        corda.crop_corda_eigens(model, config)
    except (ValueError, ZeroDivisionError, torch.linalg.LinAlgError) as error:
        raise PmLlmError(f"start subspace: PEFT cannot make 'corda' of the task's inputs: {error}") from error
    finally:
        model.train(was_training)
        for linear, before in zip(linears, hooks, strict=True):
            for key in set(linear._forward_hooks) - set(before):
                del linear._forward_hooks[key]
            for name in ("covariance_matrix", "sample_count", "rank", "corda_method"):
                linear.__dict__.pop(name, None)


@contextmanager
def _kept(layer: Any) -> Iterator[None]:
    """The base weight of a layer is afterwards what it was."""
    base = layer.get_base_layer()
    weight: Any = base.weight
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"its weights are {weight.dtype}, and they would have to change; use a base that is not in 4 bits"
        )
    before = weight.data.clone()
    try:
        yield
    finally:
        base.weight = weight
        weight.data = before
