"""Adapters in a model: which there are, which are active, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_llm.adapters.untrusted import PREFIX
from pm_llm.errors import PmLlmError

RUNNING, TASK = "running", "task"  # the names of the two adapters in a live model


def check_fit(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises PmLlmError if names were missing among an adapter's weights, or unexpected: PEFT takes what fits."""
    if missing or unexpected:
        raise PmLlmError(
            f"the adapter does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            "Is it an adapter of another base model?"
        )


def remove(model: Any, name: str) -> None:
    """Take the adapter `name` out of the model, if it is there; call :func:`set_active` afterwards."""
    if name in model.peft_config:
        # an adapter that is active when it is deleted makes PEFT choose, with a warning, which is active next
        model.base_model.set_adapter([other for other in model.peft_config if other != name])
        model.delete_adapter(name)


def set_active(model: Any, names: list[str], trainable: str | None) -> None:
    """Activate exactly `names`, and let exactly `trainable` require gradients (PEFT makes every active one trainable).

    The order of `names` is the order in which the updates are summed.
    """
    if names:
        model.base_model.set_adapter(names)
    for module in lora_layers(model).values():
        for factors in (module.lora_A, module.lora_B):
            for name, factor in factors.items():
                factor.requires_grad_(name == trainable)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of a (possibly wrapped) PeftModel by their name in the base model."""
    return {
        name.rpartition(PREFIX)[2]: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def device_of(layer: Any) -> torch.device:
    """Where an adapted layer is."""
    found: torch.device = next(layer.parameters()).device
    return found


def trainable_adapter(model: PeftModel) -> str:
    """The one adapter whose weights require gradients. Raises PmLlmError if there is none or more than one."""
    names = {
        name
        for module in lora_layers(model).values()
        for factors in (module.lora_A, module.lora_B)
        for name, factor in factors.items()
        if any(p.requires_grad for p in factor.parameters())
    }
    if len(names) != 1:
        raise PmLlmError(
            f"the model has {len(names)} trainable LoRA adapters ({', '.join(sorted(names)) or 'none'}); "
            "exactly one is needed. Freeze the others with requires_grad_(False)."
        )
    return names.pop()


@contextmanager
def scaled(layers: Iterable[LoraLayer], name: str, factor: float) -> Iterator[None]:
    """Within the block, the update of adapter `name` alone counts `factor` times; afterwards it is exactly as before.

    The product B A is multiplied once, through `LoraLayer.scaling[name]`. PEFT's `rescale_adapter_scale` would scale
    every active adapter, the frozen running one too.
    """
    layers = [layer for layer in layers if name in layer.scaling]
    before = [layer.scaling[name] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[name] = scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[name] = scaling


@contextmanager
def stretched(layers: Iterable[LoraLayer], name: str, origin: list[Tensor], factor: float) -> Iterator[None]:
    """Within the block, A and B of adapter `name` are `o + factor (p - o)`; afterwards they are exactly as before.

    Gradients are those of `p`: they are multiplied by `factor` on their way into it.

    Args:
        layers: The adapted layers.
        name: The adapter.
        origin: The o of each parameter, in the order of :func:`factors_of`.
        factor: The stretch; with 1 nothing is done.
    """
    parameters = factors_of(layers, name) if factor != 1 else []
    before = [p.data for p in parameters]
    handles = [p.register_hook(lambda g: g * factor) for p in parameters]
    try:
        for i, p in enumerate(parameters):
            origin[i] = origin[i].to(p.device)
            p.data = torch.lerp(origin[i], p.data, factor)
        yield
    finally:
        for p, data, handle in zip(parameters, before, handles, strict=True):
            p.data = data
            handle.remove()


def factors_of(layers: Iterable[LoraLayer], name: str) -> list[nn.Parameter]:
    """A and B of adapter `name` in every layer."""
    return [getattr(layer, side)[name].weight for layer in layers for side in ("lora_A", "lora_B")]
