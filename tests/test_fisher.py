"""The Fisher against autograd on dense weights, one example at a time."""

from __future__ import annotations

import pytest
import torch

from pm_llm.adapters.live import lora_layers
from pm_llm.errors import PmLlmError
from pm_llm.fisher.measure import sum_fisher
from tests.conftest import FAMILIES, batch_of, features, make_peft


def by_autograd(model, rows, family: str) -> dict[str, torch.Tensor]:
    """Square of each example's gradient in the base weights (the same matrix as W = W0 + delta), then the sum."""
    layers = lora_layers(model)
    found = {name: torch.zeros_like(layer.base_layer.weight) for name, layer in layers.items()}
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    for row in rows:
        batch = batch_of(family, [row])
        labels = batch["labels"] if family == "t5" else batch["labels"][:, 1:]
        logits = model(**batch).logits if family == "t5" else model(**batch).logits[:, :-1]
        chosen = labels[0] != -100
        log_p = torch.log_softmax(logits[0][chosen], -1).gather(1, labels[0][chosen][:, None]).sum()
        for (name, _), g in zip(
            layers.items(),
            torch.autograd.grad(log_p, [layer.base_layer.weight for layer in layers.values()]),
            strict=True,
        ):
            found[name] += g**2
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_one_by_one(family: str, batch_size: int) -> None:
    model = make_peft(family, random_b=True).eval()
    rows = features(family, 3, "sentiment") + features(family, 3, "puzzle")
    batches = [batch_of(family, rows[i : i + batch_size]) for i in range(0, 6, batch_size)]
    sums = sum_fisher(model, batches)
    expected = by_autograd(model, rows, family)
    assert sums.count == 6
    assert set(sums.modules) == set(expected)
    for name, value in expected.items():
        assert value.max() > 0
        torch.testing.assert_close(sums.modules[name]["F"], value, atol=1e-7, rtol=1e-4)


def test_is_not_the_square_of_the_batch_gradient() -> None:
    model = make_peft("llama", random_b=True)
    rows = features("llama", 4)
    one_by_one = sum_fisher(model, [batch_of("llama", rows)]).modules
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"].base_layer
    layer.weight.requires_grad_(True)
    batch = batch_of("llama", rows)
    loss = torch.nn.functional.cross_entropy(
        model(**batch).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, [layer.weight])
    assert not torch.allclose(one_by_one["model.layers.0.self_attn.q_proj"]["F"], gradient**2, rtol=0.1)


def test_leaves_the_model_as_it_was() -> None:
    model = make_peft("llama", random_b=True, lora_dropout=0.5).train()
    first = sum_fisher(model, [batch_of("llama", features("llama", 4))]).modules
    second = sum_fisher(model, [batch_of("llama", features("llama", 4))]).modules
    assert model.training  # restored
    assert all(torch.equal(first[n]["F"], second[n]["F"]) for n in first)  # dropout was off
    assert all(p.grad is None for p in model.parameters())


def test_an_example_without_answer_is_an_error() -> None:
    row = {"input_ids": [2, 5, 6], "labels": [-100, -100, -100]}
    with pytest.raises(PmLlmError, match="no answer token"):
        sum_fisher(make_peft("llama"), [batch_of("llama", [row])])
