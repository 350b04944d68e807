"""Curvature of one task: the diagonal empirical Fisher in the space of the adapted weights W (dense reference).

F = E_x[ g(x) o g(x) ],  g(x) = d/dW sum over answer tokens of log p(token | before)

The expectation is of the *square of each example's gradient*; the square of a batch gradient is a different, wrong
quantity. Taken at theta*_t = M_{t-1} + Delta_t: both adapters active, dropout off, no perturbation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pm_llm.accumulators import Zeros
from pm_llm.adapters import lora_layers
from pm_llm.errors import PmLlmError
from pm_llm.lowrank import LowRank

Fisher = dict[str, Tensor]  # module name -> (d_out, d_in), float32 on CPU


def diagonal_fisher(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    progress: Callable[[int], Any] | None = None,
    zeros: Zeros = torch.zeros,
) -> tuple[Fisher, int]:
    """The summed squared per-example gradients of every adapted weight matrix, and the number of examples.

    For one example, `dW = g' x` with the layer's inputs `x` (T, d_in) and output gradients `g` (T, d_out); examples
    share a batch but never a token, so each one's product is squared by itself. Padding adds nothing: its output
    gradients are zero.

    Args:
        model: A (possibly wrapped) PeftModel; left in the train/eval mode it had.
        batches: Model inputs with `labels`, -100 outside the answer.
        progress: Called with the number of examples after each batch.
        zeros: How the sums are made, see :mod:`pm_llm.accumulators`.

    Returns:
        The sums (divide by the total over all processes for the mean; empty without examples) and the count of
        examples seen.

    Raises:
        PmLlmError: If an example has no answer token.
    """
    sums: Fisher = {}
    count, was_training = 0, model.training
    shift = 0 if model.config.is_encoder_decoder else 1
    model.eval()
    try:
        for batch in batches:
            labels = batch["labels"][:, shift:]
            if not bool((labels != -100).any(dim=1).all()):
                raise PmLlmError("an example has no answer token, so it has no Fisher. Check its completion.")
            with record_layers(model) as calls, torch.enable_grad():
                logits = model(**batch).logits.float()
            logits = logits[:, : logits.shape[1] - shift]
            # summed, not averaged, over the answer tokens and examples: examples do not mix in the gradient
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
            for name, gradient in per_example_gradients(loss, calls):
                if name not in sums:
                    sums[name] = zeros(*gradient.shape[1:])
                sums[name] += (gradient**2).sum(dim=0).cpu()
            count += len(labels)
            if progress is not None:
                progress(len(labels))
    finally:
        model.train(was_training)
    return sums, count


Calls = dict[str, list[tuple[Tensor, Tensor]]]  # module name -> (input, output) of each call in the forward


@contextmanager
def record_layers(model: nn.Module) -> Iterator[Calls]:
    """Within the block, note input and output of every adapted layer."""
    calls: Calls = defaultdict(list)
    layers: dict[str, Any] = dict(lora_layers(model))

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.ndim != 3:
                raise PmLlmError(
                    f"module {name} gives {tuple(output.shape)}, not (batch, tokens, d_out): its gradient cannot be "
                    "told apart by example. Leave it out of target_modules."
                )
            calls[name].append((args[0].detach(), output))

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def per_example_gradients(loss: Tensor, calls: Calls) -> Iterator[tuple[str, Tensor]]:
    """For each adapted layer its (batch, d_out, d_in) gradient of `loss`, summed over the layer's calls."""
    outputs = [output for pairs in calls.values() for _, output in pairs]
    gradients = iter(torch.autograd.grad(loss, outputs, materialize_grads=True))
    for name, pairs in calls.items():
        yield (
            name,
            sum(torch.einsum("bto,bti->boi", next(gradients).float(), x.float()) for x, _ in pairs),  # type: ignore[misc]
        )


def quadratic(fisher: Fisher, x: dict[str, LowRank], y: dict[str, LowRank]) -> dict[str, float]:
    """`<F o X, Y>` of each module, summed in float64."""
    return {name: weighted_inner(f, x[name].dense(), y[name].dense()) for name, f in fisher.items()}


def weighted_inner(weight: Tensor, x: Tensor, y: Tensor) -> float:
    """`sum(weight o x o y)` in float64."""
    return float((weight.double() * x.double() * y.double()).sum())


def scale_of(fisher: Fisher, scale: str, delta: dict[str, LowRank]) -> float:
    """What to divide a task's Fisher by, to put it on a common scale.

    `raw`: 1 (the paper). `trace`: the trace over all modules becomes the number of weights. `own`: the task's
    own quadratic `<F o Delta, Delta>` becomes 1.

    Raises:
        PmLlmError: If the scale is unknown, or what it divides by is zero or not finite.
    """
    if scale == "raw":
        return 1.0
    if scale == "trace":
        size = sum(float(f.double().sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    elif scale == "own":
        size = sum(quadratic(fisher, delta, delta).values())
    else:
        raise PmLlmError(f"fisher_scale is {scale!r}; it must be raw, trace or own.")
    if not 0 < size < float("inf"):
        raise PmLlmError(
            f"fisher_scale {scale!r}: the value to divide by is {size}. The adapter did not move or diverged."
        )
    return size
