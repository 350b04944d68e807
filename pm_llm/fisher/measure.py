"""One pass over a task's rows: the Fisher in any form, the exact curvature along the task vector, and the loss."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pm_llm.adapters.live import lora_layers, trainable_adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.families.base import Family, family_of
from pm_llm.fisher.base import Fisher, Layer, form_of
from pm_llm.system.host import to_host
from pm_llm.system.mapped import Zeros
from pm_llm.system.sharing_out import in_step

Batch = dict[str, Tensor]
Take = Callable[[str, Tensor, Tensor], None]  # module name, inputs (batch, tokens, d_in), output gradients -> None
ALONG = "the whole model"  # the name under which `Sums.along` holds the sum over all modules


@dataclass
class Sums:
    """Sums over examples, to be added over processes and divided by their number.

    `form` is the Fisher's, `modules` holds each module's sums by tensor name, `along` the squares of each example's
    derivative along the task vector, of each module and under `ALONG` of all together, `slopes` the derivatives of
    each module themselves, `loss` the summed loss, `count` the examples.
    """

    form: str
    modules: dict[str, dict[str, Tensor]]
    along: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    count: int = 0

    def tensors(self) -> Iterator[Tensor]:
        """All sums, to be added up in place over the processes."""
        for sums in self.modules.values():
            yield from sums.values()
        yield from self.along.values()
        yield from self.slopes.values()
        yield self.loss

    def mean(self, count: int | None = None, loss_before: float | None = None) -> Fisher:
        """The Fisher of `count` examples (of all processes; by default those counted here).

        Args:
            count: What to divide by.
            loss_before: The mean loss before training, if it was measured.
        """
        n = self.count if count is None else count
        sums = to_host({(name, key): x.div_(n) for name, one in self.modules.items() for key, x in one.items()})
        modules = {
            name: form_of(self.form)(**{key: sums[name, key] for key in one}) for name, one in self.modules.items()
        }
        along = {name: float(x) / n for name, x in to_host(self.along).items()}
        exact = along.pop(ALONG, None)
        losses = None if loss_before is None else (loss_before, float(self.loss) / n)
        return Fisher(modules, exact, along, losses, {name: float(x) / n for name, x in to_host(self.slopes).items()})


def sum_fisher(
    model: Any,
    batches: Iterable[Batch],
    form: str = "dense",
    direction: dict[str, LowRank] | None = None,
    progress: Callable[[int], Any] | None = None,
    zeros: Zeros = torch.zeros,
    family: Family | None = None,
) -> Sums:
    """Sum the squared per-example gradients of the loss, examples in batches, one backward pass a batch.

    Each adapted layer hands over its inputs and output gradients as backward reaches it and keeps nothing. Examples
    share a batch but never a token, so each one's gradient can be told apart. Nothing below the first adapted layer
    gets a gradient, nor does any parameter. Gradient checkpointing holds if the model has it switched on.

    Args:
        model: A PeftModel with one trainable adapter; left in the mode it had.
        batches: Inputs of the family's loss; of prompts with answers with `labels`, -100 outside the answer.
        form: `dense`, `factored`, `kronecker` or `factors`.
        direction: The task vector of each module, for the exact curvature along it.
        progress: Called with the number of examples after each batch.
        zeros: How the sums are made, see :mod:`pm_llm.system.mapped`.
        family: Whose loss it is; by default the model's, on prompts with answers.

    Raises:
        PmLlmError: If an example has no answer token, or a layer's outputs are not (batch, tokens, d_out).
    """
    kind, layers, family = form_of(form), _layers(model), family or family_of(model)
    sums = Sums(form, {name: kind.blank(layer, zeros) for name, layer in layers.items()})
    towards = {name: x.to(layers[name].factors.A.device) for name, x in (direction or {}).items()}
    if direction is not None:
        sums.slopes = {name: layer.factors.A.new_zeros(()) for name, layer in layers.items()}
        sums.along = {name: x.clone() for name, x in sums.slopes.items()} | {ALONG: torch.zeros(())}

    def take(name: str, x: Tensor, g: Tensor) -> None:
        x, g = family.examples(x.float()), family.examples(g.float())
        kind.add(sums.modules[name], x, g, layers[name])
        if towards:
            slopes = (g * (x @ towards[name].A.T @ towards[name].B.T)).sum(dim=(1, 2))  # <g' x, Delta> of each example
            sums.along[name] += slopes.square().sum()
            sums.slopes[name] += slopes.sum()
            slope.append(slopes)

    slope: list[Tensor] = []
    with quiet(model), in_step(model, partial(idle, model)):
        for batch in batches:
            with tapped(model, take):
                loss = family.loss(model, batch)
                loss.backward()
            sums.loss += loss.detach().cpu()
            sums.count += len(batch["labels"])
            if towards:
                each = torch.stack([x.to(slope[0].device) for x in slope]).sum(dim=0)  # modules may be on several
                sums.along[ALONG] = sums.along[ALONG].to(each) + each.square().sum()
                slope.clear()
            _ = progress and progress(len(batch["labels"]))
    return sums


def idle(model: Any) -> None:
    """A forward and a backward pass that count for nothing."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with tapped(model, lambda *_: None):
        model(input_ids=ids, use_cache=False).logits.sum().backward()


def sum_loss(model: Any, batches: Iterable[Batch], family: Family | None = None) -> tuple[float, int]:
    """The summed loss over all examples, and their number: the forward half of :func:`sum_fisher`."""
    total, count, family = 0.0, 0, family or family_of(model)
    with quiet(model), torch.no_grad(), in_step(model):
        for batch in batches:
            total += family.loss(model, batch).item()
            count += len(batch["labels"])
    return total, count


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands over a layer's inputs and the gradient of its outputs.

    The inputs are kept as autograd keeps tensors, so gradient checkpointing frees and remakes them. `anchor` is what
    requires a gradient; nothing else needs to.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.take(x, gradients[0])
        return gradients[0], None, None, None


_apply: Any = _Tap.apply


@contextmanager
def tapped(model: Any, take: Take) -> Iterator[None]:
    """Within the block, a backward pass calls `take` for every adapted layer, once, with all its tokens."""
    anchor = torch.zeros((), requires_grad=True)
    calls: Counter[str] = Counter()  # of the forward pass; checkpointing calls again in the backward pass
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    forward = [False]

    def hook(name: str) -> Callable[..., Tensor]:
        def arrived(x: Tensor, g: Tensor) -> None:
            waiting[name].append((x, g))
            if len(waiting[name]) == calls[name]:  # a layer called twice has one gradient: its calls' tokens together
                pairs = waiting.pop(name)
                take(
                    name, *(torch.cat(part, dim=1) if len(pairs) > 1 else part[0] for part in zip(*pairs, strict=True))
                )

        def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if output.ndim != 3:
                raise PmLlmError(
                    f"module {name} gives {tuple(output.shape)}, not (batch, tokens, d_out): its gradient cannot be "
                    "told apart by example. Leave it out of target_modules."
                )
            calls[name] += forward[0]
            found: Tensor = _apply(output, args[0].detach(), anchor, arrived)
            return found

        return record

    layers: dict[str, Any] = dict(lora_layers(model))
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    handles.append(model.register_forward_pre_hook(lambda *_: forward.__setitem__(0, True)))
    handles.append(model.register_forward_hook(lambda *_: forward.__setitem__(0, False)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, pairs in waiting.items():  # called again where the loss does not see it
        take(name, *(torch.cat(part, dim=1) for part in zip(*pairs, strict=True)))


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Within the block: evaluation mode, but for what checkpoints, and no parameter that wants a gradient.

    A layer checkpoints in training mode only; the dropout of its own that some have (OPT, BART) is set to 0.
    """
    dropouts: list[tuple[nn.Module, str, float]] = []
    modes = [(module, module.training) for module in model.modules()]
    wanting = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            own = [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
            dropouts += [(module, key, getattr(module, key)) for key in own]
            for key in own:
                setattr(module, key, 0.0)
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module, key, value in dropouts:
            setattr(module, key, value)


def _layers(model: Any) -> dict[str, Layer]:
    """The adapted layers with the trained adapter's factors, the scaling in B, in float32 where the model is."""
    adapter, found = trainable_adapter(model), {}
    layers: dict[str, Any] = dict(lora_layers(model))
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        factors = LowRank(b.float() * layer.scaling[adapter], a.float())
        found[name] = Layer((layer.out_features, layer.in_features), factors)
    return found
