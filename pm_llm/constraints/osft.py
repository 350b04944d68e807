"""OSFT: the weights' small singular directions are trained, the large ones stay (arXiv 2504.07097)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import OSFConfig
from peft.tuners.osf.layer import Linear as OsfLinear
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from pm_llm.adapters.adapter import Adapter, block_of
from pm_llm.adapters.live import RUNNING, set_active
from pm_llm.algebra.lowrank import LowRank, truncate
from pm_llm.constraints.base import Constraint, Context, Live, Step
from pm_llm.errors import PmLlmError, check_number
from pm_llm.fisher.inputs import pass_rows
from pm_llm.system.host import to_host
from pm_llm.system.options import option
from pm_llm.system.processes import total

SIDES = ("U_low", "S_low", "V_low")


class _Layer(OsfLinear):
    """PEFT's layer with `U S V' - U0 S0 V0' = (U S - U0 S0) V' + U0 S0 (V' - V0')`: the differences are small, and
    would be lost where the products are rounded, as under autocast to bfloat16, before they are subtracted."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (d_out, 2 n) and A (2 n, d_in) of the change."""
        layers: Any = self.osf_svd_params
        ((name, now),) = layers.items()
        began = self._osf_U_low_init[name] * self._osf_S_low_init[name]
        B = torch.cat([now["U_low"] * now["S_low"] - began, began], dim=1)
        return B, torch.cat([now["V_low"], now["V_low"] - self._osf_V_low_init[name]])

    def change(self) -> LowRank:
        """The same, detached and on CPU."""
        return LowRank(*(x.detach().float().cpu() for x in self.factors()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        B, A = self.factors()
        found: Tensor = result + linear(linear(x.to(A.dtype), A), B).to(result.dtype)
        return found


@dataclass
class Osft(Constraint):
    """`W = W0 + M_{t-1} = U S V'` of each adapted module is trained whole, but for its k largest singular directions:
    U, S and V of the others move, U and V only orthogonally to what stays. So `W_new x = W x` for every x in the span
    of the k right directions. The layer that does it is PEFT's `osf`; it projects the gradients, and as Adam's rates
    lead away from there again, what the optimizer did is projected here too. Weight decay draws U, S and V to 0, not
    back to the base weights: leave it at 0.

    `k / min(d_out, d_in) = minimum + I (target - minimum)` adapts to the layer: I is the mean cosine of what goes into
    and comes out of the module's block, divided by its mean over the blocks; at most all directions but one stay. (The
    paper's I compares inputs and outputs of a layer; for matrices that are not square we take the block's.) It is
    measured, on the rows that a Fisher would be measured on, before each task.

    What was learned, `U S V' - U0 S0 V0'`, is handed on as a LoRA adapter: its best approximation of rank `rank`,
    whose relative error (Frobenius, over all modules) is recorded with the stage as `osft_error`. A and B are not
    trained.

    Args:
        rank: The rank of the adapter that is handed on.
        rate: Factor on the learning rate: rates for LoRA are too high for weights.
        minimum: Share of the directions that the least important block would keep.
        target: Share that a block of average importance keeps.
    """

    rank: int = option(64, least=1)
    rate: float = option(0.1, least=0)
    minimum: float = option(0.1, least=0, most=1)
    target: float = option(0.8, least=0, most=1)
    _layers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _before: list[Tensor] = field(default_factory=list, init=False, repr=False)
    from_zero = True
    anew = "what it trains comes on top of the merged weights"
    trains_weights = True
    scales_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("osft: target", self.target, self.minimum, 1)

    def begin(self, context: Context) -> None:
        assert context.live is not None
        live, importance = context.live, block_importance(context)
        mean = sum(importance.values()) / max(len(importance), 1)
        for name, layer in live.layers.items():
            base = layer.get_base_layer()
            if type(base) is not nn.Linear:
                raise PmLlmError(f"osft: {name} is a {type(base).__name__}; it needs plain linear layers.")
            relative = importance.get(block_of(name), mean) / mean if mean > 0 else 1.0
            share = self.minimum + relative * (self.target - self.minimum)
            small = min(base.weight.shape)
            kept = min(max(round(share * small), 1), small - 1)
            weight = base.weight.detach().float()
            if RUNNING in layer.active_adapters:  # not folded into the weights
                weight = weight + layer.get_delta_weight(RUNNING).float()
            carrier = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            carrier.weight = nn.Parameter(weight, requires_grad=False)
            wrapped = _Layer(carrier, live.adapter, OSFConfig(), effective_rank=kept)
            wrapped.base_layer = layer.base_layer
            layer.base_layer = self._layers[name] = wrapped

    def before_update(self, step: Step, live: Live) -> None:
        for p in live.parameters():
            p.grad = None  # optimizers pass over A and B
        self._before = [p.data.clone() for *_, p in self._trained()]

    def after_update(self, step: Step, live: Live) -> None:
        for (layer, side, p), before in zip(self._trained(), self._before, strict=True):
            p.data = before + self.rate * off_kept(layer, side, live.adapter, p.data - before)
        self._before = []

    def finish(self, context: Context) -> dict[str, float]:
        assert context.live is not None
        lost = whole = 0.0
        factors = {}
        for name, wrapped in self._layers.items():
            factors[name], missed, size = truncate(wrapped.change(), self.rank)
            lost, whole = lost + missed, whole + size
            context.live.layers[name].base_layer = wrapped.base_layer
        self._layers = {}
        model, active = context.model, list(context.model.active_adapters)
        Adapter.from_model(model, context.live.adapter).replace_factors(factors).attach(model, context.live.adapter)
        set_active(model, active, trainable=context.live.adapter)
        return {"osft_error": (lost / whole) ** 0.5 if whole else 0.0}

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"weights": [p.data for *_, p in self._trained()]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for (*_, p), found in zip(self._trained(), state["weights"], strict=True):
            p.data = found.to(p.data)

    def _trained(self) -> Iterator[tuple[Any, str, Any]]:
        """What is trained, with its layer and side."""
        for layer in self._layers.values():
            for params in layer.osf_svd_params.values():
                yield from ((layer, side, params[side]) for side in SIDES)


def off_kept(layer: Any, side: str, adapter: str, move: Tensor) -> Tensor:
    """A movement of U_low (d_out, n) or V_low (n, d_in) less its part in the directions that stay; S_low's is free.

    PEFT keeps those, `*_high`, only where the beginning of what is trained does not say them already.
    """
    if side == "S_low":
        return move
    high, low = getattr(layer, f"_osf_{side[0]}_high"), getattr(layer, f"_osf_{side}_init")[adapter]
    found: Tensor
    if side == "U_low":
        found = move - high[adapter] @ (high[adapter].T @ move) if adapter in high else low @ (low.T @ move)
    else:
        found = move - (move @ high[adapter].T) @ high[adapter] if adapter in high else (move @ low.T) @ low
    return found


def block_importance(context: Context) -> dict[str, float]:
    """For each block with an adapted module the mean cosine, at least 0, of its input and output states (d,) over all
    positions of the chosen rows. Modules outside of blocks, such as a head, have none, nor have blocks that no row
    passes, as of a vision tower."""
    assert context.live is not None
    assert context.chosen is not None
    blocks = {block for block in map(block_of, context.live.layers) if block}
    sums = {name: torch.zeros(2) for name in sorted(blocks)}
    with _comparing(context.model.get_base_model(), sums):
        pass_rows(context.model, context.chosen)
    found = {name: x.tolist() for name, x in to_host({name: total(x) for name, x in sums.items()}).items()}
    return {name: max(cosines / count, 0.0) for name, (cosines, count) in found.items() if count}


@contextmanager
def _comparing(base: nn.Module, sums: dict[str, Tensor]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def compare(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            x = inputs[0] if inputs else named["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            cosines = cosine_similarity(x.float(), y.float(), dim=-1)
            sums[name] = sums[name].to(x.device) + torch.stack([cosines.sum(), torch.ones_like(cosines).sum()])

        return compare

    with ExitStack() as stack:
        for name in sums:
            handle = base.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
