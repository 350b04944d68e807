"""Preference pairs: loss, Fisher and score against what they are by definition, and against TRL."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from pm_llm import ContinualDPOTrainer, ContinualSequence, PmLlmError
from pm_llm.adapters.live import lora_layers
from pm_llm.config import load_config
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.scorers import score
from pm_llm.families.packing import blocks
from pm_llm.families.preference import Preference
from pm_llm.fisher.rows import ChosenRows
from pm_llm.sections import EvaluationSection, FisherSection
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, make_peft, tokenizer
from tests.helpers.kinds import encoder, kind_tasks, of_kind
from tests.helpers.presets import KEYS

TEXT = DECODER.of("text")
PAIRS = DECODER.of("preference")
HOW = EvaluationSection()


def pair_rows(model, count: int = 6) -> list[dict]:
    task = of_kind("preference", "topic", train=count)
    rows = encoder("preference", task).features(task.train)
    return PAIRS.referenced(model, tokenizer("llama"), rows, 4)


def log_likelihood(model, row: dict, key: str) -> torch.Tensor:
    ids = torch.tensor([row["prompt_ids"] + row[key]])
    logits = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    each = logits.gather(1, ids[0, 1:, None])[:, 0]
    return each[len(row["prompt_ids"]) - 1 :].sum()


def moved(model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)


def test_the_loss_of_a_pair_is_dpos_and_its_fisher_the_square_of_its_gradient() -> None:
    model = make_peft("llama", random_b=True)
    rows = pair_rows(model)
    assert rows[0]["ref_chosen_logps"] == pytest.approx(log_likelihood(model, rows[0], "chosen_ids").item(), rel=1e-4)
    moved(model)
    squares, total = {}, 0.0
    layers = lora_layers(model)
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers.values()]
    for row in rows:
        margins = [log_likelihood(model, row, f"{k}_ids") - row[f"ref_{k}_logps"] for k in ("chosen", "rejected")]
        loss = -logsigmoid(0.1 * (margins[0] - margins[1]))
        for (name, _), g in zip(layers.items(), torch.autograd.grad(loss, weights), strict=True):
            squares[name] = squares.get(name, 0) + g.square() / len(rows)
        total += float(loss.detach()) / len(rows)
    for weight in weights:
        weight.requires_grad_(False)
    chosen = ChosenRows("t", rows, FisherSection(samples=len(rows), batch_size=4), 0, tokenizer("llama"), PAIRS)
    assert chosen.loss(model) == pytest.approx(total, rel=1e-4)
    found = chosen.fisher(model, "dense")
    for name, expected in squares.items():
        torch.testing.assert_close(found.modules[name].F, expected, rtol=1e-3, atol=1e-8)


def test_the_fisher_of_text_is_over_blocks() -> None:
    model, task = make_peft("llama", random_b=True), of_kind("text", "topic", train=6)
    rows = blocks(encoder("text", task, 64).features(task.train), 64, model)
    assert 1 < len(rows) < 6
    layers, squares = lora_layers(model), {}
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers.values()]
    for row in rows:
        loss = TEXT.loss(model, TEXT.collator(tokenizer("llama"), model)([row]))
        for (name, _), g in zip(layers.items(), torch.autograd.grad(loss, weights), strict=True):
            squares[name] = squares.get(name, 0) + g.square() / len(rows)
    for weight in weights:
        weight.requires_grad_(False)
    config = FisherSection(samples=len(rows), batch_size=2)
    found = ChosenRows("t", rows, config, 0, tokenizer("llama"), TEXT).fisher(model, "dense")
    for name, expected in squares.items():
        torch.testing.assert_close(found.modules[name].F, expected, rtol=1e-3, atol=1e-7)


def dpo(cls, model, rows: list[dict], out, **keys):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    options |= {"save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True, "max_length": None}
    args = DPOConfig(str(out), **options, gradient_checkpointing=False, disable_tqdm=True)
    trainer = cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer("llama"), **keys)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_it_trains_as_trl_does_where_trl_can(tmp_path) -> None:
    """From a fresh adapter, where TRL's reference, the base alone, is the model before the task too."""
    rows = [
        {"prompt": row.prompt, "chosen": f" {row.completion}", "rejected": f" {row.rejected}"}
        for row in (of_kind("preference", "topic").train)
    ]
    ours, theirs = make_peft("llama"), make_peft("llama")
    losses = dpo(ContinualDPOTrainer, ours, rows, tmp_path / "a")
    assert losses == pytest.approx(dpo(DPOTrainer, theirs, rows, tmp_path / "b"), rel=1e-5)
    assert losses[0] == pytest.approx(log(2), rel=1e-5)
    ended = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p, ended[name], rtol=1e-4, atol=1e-6)
    assert "ref" not in ours.peft_config


def test_the_reference_is_the_model_as_it_is_given(tmp_path) -> None:
    """Of an adapter that is trained on, not the base."""
    rows = [
        {"prompt": row.prompt, "chosen": f" {row.completion}", "rejected": f" {row.rejected}"}
        for row in (of_kind("preference", "topic").train)
    ]
    losses = dpo(ContinualDPOTrainer, make_peft("llama", random_b=True), rows, tmp_path / "a")
    assert losses[0] == pytest.approx(log(2), rel=1e-5)


def test_what_does_not_go_with_pairs_is_refused(tmp_path) -> None:
    from pm_llm.constraints.anchor import Anchor

    with pytest.raises(PmLlmError, match="anchor adds to the loss of answer tokens"):
        dpo(
            ContinualDPOTrainer,
            make_peft("llama"),
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            tmp_path,
            constraint=Anchor(1.0),
        )
    keys = {**KEYS, "output_dir": str(tmp_path / "run")}
    with pytest.raises(PmLlmError, match="constrain anchor adds to the loss of each answer token"):
        ContinualSequence(load_config(None, {**keys, "constrain": "anchor"}), kind_tasks("preference"))
    mixed = [of_kind("preference", "topic"), of_kind("prompt", "sentiment")]
    with pytest.raises(PmLlmError, match="constrain replay trains rows of all tasks together"):
        ContinualSequence(load_config(None, {**keys, "method": "replay"}), mixed)
    run = ContinualSequence(load_config(None, {**keys, "train.extra": {"loss_type": "ipo"}}), kind_tasks("preference"))
    with pytest.raises(PmLlmError, match="sets loss_type, which a run must decide"):
        run.run()


def test_which_answer_is_better_is_drawn_with_the_models_own_chances() -> None:
    model = make_peft("llama", random_b=True)
    (row,) = pair_rows(model, 2)[:1]
    moved(model)
    margins = [log_likelihood(model, row, f"{k}_ids").item() - row[f"ref_{k}_logps"] for k in ("chosen", "rejected")]
    strong = Preference(beta=5.0)
    drawn = strong.draw(model, Encoder(tokenizer("llama"), strong, 64, 8), [row] * 300, 0, HOW)
    kept = sum(one == row for one in drawn) / 300
    assert kept == pytest.approx(1 / (1 + exp(-5.0 * (margins[0] - margins[1]))), abs=0.09)
    swapped = next(one for one in drawn if one != row)
    assert swapped["chosen_ids"] == row["rejected_ids"]
    assert swapped["ref_chosen_logps"] == row["ref_rejected_logps"]


def test_pairs_are_scored_by_which_answer_gained() -> None:
    task, model = of_kind("preference", "topic", test=4), make_peft("llama", random_b=True)
    found = answer_task(model, encoder("preference", task), task, HOW)
    rows = encoder("preference", task).features(task.test)
    expected = []
    for row in rows:
        with torch.no_grad():
            ours = [float(log_likelihood(model, row, f"{k}_ids")) for k in ("chosen", "rejected")]
            with model.disable_adapter():
                base = [float(log_likelihood(model, row, f"{k}_ids")) for k in ("chosen", "rejected")]
        expected.append(ours[0] - ours[1] - base[0] + base[1])
    assert found.predictions == pytest.approx(expected, abs=1e-4)
    assert found.score() == 25.0 * sum(x > 0 for x in expected)
    assert answer_task(model.get_base_model(), encoder("preference", task), task, HOW).score() is not None
    assert score("pair_accuracy", [1.0, -1.0, 0.0], [[0.0]] * 3) == 50.0
