"""How a task's adapter begins."""

from __future__ import annotations

import pytest
import torch

from pm_llm.adapters import Adapter, lora_layers, remove, trainable_adapter
from pm_llm.config import LoraSection
from pm_llm.starts import RUNNING, TASK
from pm_llm.starts.continuing import Continue
from pm_llm.starts.fresh import Fresh
from tests.conftest import FAMILIES, batch_of, features, make_model, make_peft, targets


def running_adapter(family: str) -> tuple[Adapter, torch.Tensor, dict]:
    """A random adapter of rank 4, and the logits it gives."""
    model = make_peft(family, random_b=True).eval()
    batch = batch_of(family, features(family, 3))
    with torch.no_grad():
        return Adapter.from_model(model, "default"), model(**batch).logits, batch


@pytest.mark.parametrize("start", [Fresh(), Continue()])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_starts_from_the_running_model(family: str, start) -> None:
    running, expected, batch = running_adapter(family)
    lora = LoraSection(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=targets(family))
    model = start.prepare(make_model(family), running, lora, family == "t5").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
    assert trainable_adapter(model) == TASK
    assert model.active_adapters == ([RUNNING, TASK] if isinstance(start, Fresh) else [TASK])
    for layer in lora_layers(model).values():
        # both train at the rate the user asked for, with the user's dropout
        assert layer.scaling[TASK] == pytest.approx(8.0)
        assert layer.lora_dropout[TASK].p == 0.1


@pytest.mark.parametrize("start", [Fresh(), Continue()])
def test_again_and_again(start) -> None:
    """Task after task on one model: adapters do not pile up, and the model stays the running one."""
    running, expected, batch = running_adapter("llama")
    model = make_model("llama")
    for _ in range(3):
        model = start.prepare(model, running, LoraSection(r=4), False).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
        assert set(model.peft_config) <= {RUNNING, TASK}
        running = Adapter.from_model(model, TASK) if start.continues else running
        running.attach(model, RUNNING)  # as the sequence does after a merge
        remove(model, TASK)
        assert set(model.peft_config) == {RUNNING}
