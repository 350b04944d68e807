"""Rows in blocks: each sees itself alone, and loss, gradient and perplexity are those of the rows apart."""

from __future__ import annotations

from math import exp

import pytest
import torch
from datasets import Dataset

from pm_llm import PmLlmError
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.scorers import score
from pm_llm.families.packing import Packing, blocks, check_packing, no_padding, packed, takes_packing
from pm_llm.sections import EvaluationSection
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, make_model, make_peft, tokenizer
from tests.conftest import KINDS as FAMILY
from tests.helpers.kinds import encoder, of_kind

TEXT = DECODER.of("text")
PAIRS = DECODER.of("preference")
HOW = EvaluationSection()


def test_every_token_of_a_text_is_said_once_and_after_what_came_before() -> None:
    row = of_kind("text", "question").train[0]
    whole = TEXT.document(Encoder(tokenizer("llama"), TEXT, 400, 1), row)
    assert whole[-1] == tokenizer("llama").eos_token_id
    pieces = TEXT.pieces(Encoder(tokenizer("llama"), TEXT, 7, 1), row)
    assert all(len(piece["input_ids"]) <= 7 for piece in pieces)
    said = [x for piece in pieces for x in piece["labels"] if x != -100]
    assert said == whole[1:]
    assert pieces[1]["input_ids"][0] == pieces[0]["input_ids"][-1]


def test_rows_of_blocks_stay_apart_when_they_are_packed_again() -> None:
    rows = [{"input_ids": [2, i, i + 1], "labels": [-100, i, i + 1]} for i in range(5, 15)]
    once = packed(Dataset.from_list(rows), 7)
    again = packed(Dataset.from_list([*once.to_list(), *rows[:2]]), 10)
    assert {n for one in again["seq_lengths"] for n in one} == {3}
    assert sum(map(len, again["seq_lengths"])) == 12
    assert sorted(i for one in again["input_ids"] for i in one) == sorted(
        i for row in [*rows, *rows[:2]] for i in row["input_ids"]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_in_blocks_have_the_loss_and_gradient_that_they_have_alone(attention: str) -> None:
    model = make_peft("llama", random_b=True)
    model.get_base_model().set_attn_implementation(attention)
    assert takes_packing(model)
    rows = encoder("prompt", of_kind("prompt", "sentiment")).features(of_kind("prompt", "sentiment").train)
    found = packed(Dataset.from_list(rows), 64)
    assert len(found) < len(rows)
    assert sum(map(len, found["seq_lengths"])) == len(rows)
    losses = []
    for some in (rows, found.to_list()):
        batch = Packing(tokenizer("llama"), model)(some)
        loss = DECODER.loss(model, batch)
        gradient = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        losses.append((loss, gradient))
        real = no_padding(batch)
        real = batch["attention_mask"].bool() if real is None else real
        assert int(real.sum()) == sum(len(row["input_ids"]) for row in rows)
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=1e-4)
    for a, b in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_no_blocks_is_told_from_one_that_does() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).eval()  # no positions
    assert not takes_packing(bloom)
    rows = [{"input_ids": [2, 5, 1], "labels": [-100, 5, 1]}] * 2
    assert blocks(rows, 8, bloom) == rows
    with pytest.raises(PmLlmError, match="does not tell apart rows in one block"):
        check_packing(bloom, DECODER)
    for family, said in ((FAMILY["t5"], "encoder-decoder"), (PAIRS, "preference pairs")):
        with pytest.raises(PmLlmError, match=said):
            check_packing(make_model("llama"), family)


def test_perplexity_is_that_of_all_tokens_and_of_all_bytes() -> None:
    task, model = of_kind("text", "topic", test=3), make_peft("llama", random_b=True)
    how = encoder("text", task, 16)
    found = answer_task(model, how, task, HOW)
    nats, tokens, size = 0.0, 0, 0
    for row in task.test:
        ids = TEXT.document(how, row)
        for at in range(0, len(ids) - 1, 15):
            piece = torch.tensor([ids[at : at + 16]])
            with torch.no_grad():
                chances = model(input_ids=piece).logits.log_softmax(-1)[0, :-1]
            nats -= float(chances.gather(1, piece[0, 1:, None]).sum())
        tokens, size = tokens + len(ids) - 1, size + len(row.completion.encode())
    assert found.score() == pytest.approx(exp(nats / tokens), rel=1e-4)
    assert found.score("byte_perplexity") == pytest.approx(exp(nats / size), rel=1e-4)
    with pytest.raises(PmLlmError, match="do not say how many bytes"):
        score("byte_perplexity", [1.0], [[3]])


def test_next_tokens_of_a_text_are_drawn_as_often_as_the_model_says() -> None:
    """The labels alone: the text before each token stays."""
    model, row = make_peft("llama", random_b=True), {"input_ids": [2, 5, 9], "labels": [-100, 5, 9]}
    drawn = TEXT.draw(model, Encoder(tokenizer("llama"), TEXT, 16, 1), [row] * 300, 0, HOW)
    assert all(one["input_ids"] == row["input_ids"] for one in drawn)
    assert all(one["labels"][0] == -100 for one in drawn)
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[2, 5]])).logits[0].softmax(-1)
    for at in (1, 2):
        most = int(chances[at - 1].argmax())
        share = sum(one["labels"][at] == most for one in drawn) / 300
        assert share == pytest.approx(float(chances[at - 1, most]), abs=0.09)
