"""Raw text and preference pairs: their rows, losses, Fishers and scores against what they are by definition."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from pm_llm import ContinualDPOTrainer, ContinualSequence, PmLlmError
from pm_llm.adapters.live import lora_layers
from pm_llm.config import EvaluationSection, FisherSection, RunConfig, load_config
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.matrix import Matrix
from pm_llm.evaluation.scorers import score
from pm_llm.families.base import KINDS
from pm_llm.families.packing import Packing, blocks, check_packing, no_padding, packed, takes_packing
from pm_llm.families.preference import Preference
from pm_llm.fisher.rows import ChosenRows
from pm_llm.tasks.base import Example, Task, checked
from pm_llm.tasks.encoding import Encoder, encoder_for
from pm_llm.tasks.loading import load_tasks
from tests.conftest import DECODER, make_model, make_peft, tokenizer
from tests.conftest import KINDS as FAMILY
from tests.helpers.kinds import kind_tasks, of_kind
from tests.helpers.presets import KEYS

TEXT, PAIRS = DECODER.of("text"), DECODER.of("preference")
HOW = EvaluationSection()


def encoder(kind: str, task: Task, max_length: int = 64) -> Encoder:
    return encoder_for(tokenizer("llama"), DECODER.of(kind), task, max_length, None)


# ---- rows ----
def test_an_encoder_decoder_has_prompts_with_answers_only() -> None:
    for kind in ("text", "preference"):
        with pytest.raises(PmLlmError, match=f"{KINDS[kind]} can be trained on decoders"):
            FAMILY["t5"].of(kind)


def file_of(tmp_path, *rows: dict, name: str = "a"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    return str(tmp_path / f"{name}.jsonl")


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"text": "a text ."}, {}, Example("", "a text .", kind="text")),
        ({"body": "a text .", "url": "x"}, {"text": "body"}, Example("", "a text .", kind="text")),
        (
            {"prompt": "q ?", "chosen": "yes", "rejected": "no"},
            {},
            Example("q ?", "yes", rejected="no", kind="preference"),
        ),
        (
            {"question": "q ?", "chosen": "yes", "rejected": "no", "score_chosen": 2.0},
            {},
            Example("q ?", "yes", rejected="no", kind="preference"),
        ),
        (
            {
                "chosen": [turn("user", "q ?"), turn("assistant", "yes")],
                "rejected": [turn("user", "q ?"), turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
        (
            {
                "prompt": [turn("user", "q ?")],
                "chosen": [turn("assistant", "yes")],
                "rejected": [turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
        (
            {  # as UltraFeedback has it
                "prompt": "q ?",
                "chosen": [turn("user", "q ?"), turn("assistant", "yes")],
                "rejected": [turn("user", "q ?"), turn("assistant", "no")],
            },
            {},
            Example("", "yes", messages=(turn("user", "q ?"),), rejected="no", kind="preference"),
        ),
    ],
)
def test_kinds_are_found_by_their_columns(row: dict, keys: dict, expected: Example, tmp_path) -> None:
    (task,) = load_tasks(RunConfig(tasks=[{"data": file_of(tmp_path, row), **keys}]))
    assert replace(task.train[0], place="") == expected
    assert task.kind == expected.kind
    assert task.scorer == {"text": "perplexity", "preference": "pair_accuracy"}[expected.kind]


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"text": "a", "title": "b"}, {}, "text and nothing beside it leave out title. Leave out with `ignore"),
        ({"text": " "}, {}, "its text is empty"),
        ({"text": "a"}, {"labels": ["a", "b"]}, "raw text has no labels"),
        ({"text": "a"}, {"scorer": "rougeL"}, "rougeL does not score rows of the kind text. Use perplexity"),
        ({"prompt": "q", "completion": "a"}, {"scorer": "pair_accuracy"}, "pair_accuracy does not score rows"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, {}, "its two answers are one"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, {}, "one of its two answers is empty"),
        ({"chosen": "a b", "rejected": [turn("user", "a")]}, {}, "must be two texts, or two lists of turns"),
        (
            {
                "chosen": [turn("user", "p"), turn("assistant", "yes")],
                "rejected": [turn("user", "q"), turn("assistant", "no")],
                "prompt": [],
            },
            {},
            "answer different prompts",
        ),
    ],
)
def test_what_is_wrong_with_them_is_told(row: dict, keys: dict, said: str, tmp_path) -> None:
    with pytest.raises(PmLlmError, match=said):
        load_tasks(RunConfig(tasks=[{"data": file_of(tmp_path, row), **keys}]))


def test_a_task_has_rows_of_one_kind() -> None:
    with pytest.raises(PmLlmError, match="of the kind 'text', and the task's first row of 'prompt'"):
        checked([Task("t", [Example("q", "a"), Example("", "a", kind="text")], [Example("q", "a")])])


# ---- blocks ----
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


# ---- pairs ----
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


# ---- sequences ----
def test_averages_are_of_scores_that_are_better_high(tmp_path) -> None:
    keys = {**KEYS, "evaluate": "all", "method": "seqlora", "output_dir": str(tmp_path / "run")}
    results = ContinualSequence(load_config(None, keys), kind_tasks("mixed")).run()
    assert results["aside"] == ["sentiment"]
    assert results["scorers"] == ["perplexity", "exact_match"]
    assert results["average_accuracy"] == results["matrix"][-1][1]
    assert all(row[0] > 1 for row in results["matrix"])
    assert "backward_transfer" not in results


def test_the_matrix_without_what_is_aside() -> None:
    scores = {
        (0, 0): 9.0,
        (1, 0): 8.0,
        (1, 1): 50.0,
        (2, 0): 8.5,
        (2, 1): 40.0,
        (2, 2): 60.0,
        (0, 1): 1.0,
        (0, 2): 1.0,
    }
    matrix = Matrix(["text", "a", "b"], scores, aside=frozenset({"text"}))
    assert matrix.average_accuracy() == 50.0
    assert matrix.average_over_time() == 50.0
    assert matrix.backward_transfer() == -10.0
    assert matrix.forgetting() == 10.0
    assert matrix.plasticity() == 55.0


def test_packing_trains_the_same_rows_in_fewer(tmp_path) -> None:
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run"), "train.packing": True, "max_length": 64}
    keys |= {"train.max_steps": -1, "train.save_steps": 100}
    run = ContinualSequence(load_config(None, keys), kind_tasks("prompt"))
    run.run()
    logs = [run.run_dir.log(stage) for stage in (0, 1)]
    assert all(log[-1]["step"] < 3 for log in logs)  # 12 rows in batches of 4


# ---- from Python ----
ROWS = [{"prompt": f"is {i} even ?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(12)]


def test_tasks_come_from_datasets_streams_and_rows() -> None:
    task = Task.from_rows("even", ROWS, ROWS[:4], labels=["yes", "no"])
    assert (len(task.train), len(task.test), task.labels) == (12, 4, ("yes", "no"))
    assert task.test[3].place == "even/test:row 4"
    assert Task.from_dataset("even", Dataset.from_list(ROWS), Dataset.from_list(ROWS[:4])).train == task.train
    assert Task.from_dataset("even", Dataset.from_list(ROWS).to_iterable_dataset(), ROWS[:4]).train == task.train
    law = [{"question": "q ?", "words": ["a", "b"], "answer": "x"}] * 10
    task = Task.from_rows("law", law, prompt="{question} {words}", completion="answer", test_size=0.2)
    assert (len(task.train), len(task.test), task.train[0].body) == (8, 2, "q ? a\nb")
    assert Task.from_rows("text", [{"text": "a text ."}] * 10).kind == "text"


def test_what_is_wrong_with_rows_in_memory_is_told_by_split_and_number() -> None:
    with pytest.raises(PmLlmError, match="even/train:row 2: its answer"):
        Task.from_rows("even", [ROWS[0], {**ROWS[1], "completion": ""}, *ROWS[2:]], ROWS)
    found = Task.from_rows("even", [ROWS[0], {**ROWS[1], "completion": ""}, *ROWS[2:]], ROWS, bad_rows="drop")
    assert len(found.train) == 11
    with pytest.raises(PmLlmError, match="unknown key 'promt'"):
        Task.from_rows("even", ROWS, ROWS, promt="prompt")


def test_a_run_of_tasks_made_in_python(tmp_path) -> None:
    keys = {**KEYS, "output_dir": str(tmp_path / "run"), "method": "seqlora"}
    tasks = [Task.from_rows(name, ROWS, ROWS[:2]) for name in ("one", "two")]
    assert ContinualSequence(load_config(None, keys), tasks=tasks).run()["stages"] == ["one", "two"]


def test_a_fisher_in_one_call_is_that_of_a_run() -> None:
    from pm_llm import mean_loss, measure

    model, task = make_peft("llama", random_b=True), of_kind("prompt", "sentiment")
    rows = encoder("prompt", task).features(task.train)
    chosen = ChosenRows("t", rows, FisherSection(samples=5), 3, tokenizer("llama"), DECODER)
    expected = chosen.fisher(model, "dense").modules
    masked = [{"input_ids": row["input_ids"], "completion_mask": [x != -100 for x in row["labels"]]} for row in rows]
    given = {"samples": 5, "seed": 3}
    for some in (task, Dataset.from_list(rows), masked):
        found = measure(model, some, tokenizer("llama"), form="dense", **given, max_length=64)
        for name, one in found.modules.items():
            torch.testing.assert_close(one.F, expected[name].F)
    assert mean_loss(model, task, tokenizer("llama"), **given) == pytest.approx(chosen.loss(model))
    with pytest.raises(PmLlmError, match="needs input_ids and labels"):
        measure(model, ROWS, tokenizer("llama"))
    with pytest.raises(PmLlmError, match="no row"):
        measure(model, [], tokenizer("llama"))


# ---- what a run would train on ----
def test_tasks_check_says_what_is_learnt_of_each_kind(tmp_path, capsys) -> None:
    from pm_llm.cli import main

    chat = {"messages": [turn("user", "a ?"), turn("assistant", "b"), turn("user", "c ?"), turn("assistant", "d")]}
    one = tokenizer("llama")
    one.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    make_model("llama").save_pretrained(tmp_path / "model")
    one.save_pretrained(tmp_path / "model")
    files = [
        file_of(tmp_path, chat, name="chats"),
        file_of(tmp_path, {"text": "a cat ."}, name="texts"),
        file_of(tmp_path, {"prompt": "q ?", "chosen": "yes", "rejected": "no"}, name="pairs"),
    ]
    assert main(["tasks", "check", *files, "--model", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "chats of turns min 4 50% 4 90% 4 99% 4 max 4; 0 with tools, 0 with tool calls" in said
    assert said.count("[[ b </assistant>]]") == 3
    assert said.count("[[d </assistant></s>]]") == 3
    assert "texts: raw text, scorer perplexity\n  train: 5 documents" in said
    assert "<s>[[a cat .</s>]]" in said
    assert "pairs: preference pairs, scorer pair_accuracy\n  train: 5 pairs" in said
    assert "[[ yes</s>]][[ no</s>]]" in said
    assert said.count("tokens carry loss") == 3


def test_t5_takes_prompts_with_answers_only(tmp_path, capsys) -> None:
    from pm_llm.cli import main

    assert main(["tasks", "check", file_of(tmp_path, {"text": "a cat ."}), "--model", "embedded:t5"]) == 2
    assert "raw text can be trained on decoders (LLaMA-like models) only" in capsys.readouterr().err


def test_the_attention_is_the_one_that_is_named(pico_folders) -> None:
    from pm_llm.families.models import load_base

    for name in ("eager", "sdpa"):
        assert load_base(pico_folders["llama"], attn_implementation=name).model.config._attn_implementation == name
    with pytest.raises(PmLlmError, match="attn_implementation is 'none_such'"):
        load_base(pico_folders["llama"], attn_implementation="none_such")


def test_rows_are_grouped_by_length(tmp_path, monkeypatch) -> None:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    made = []
    original = LengthGroupedSampler.__init__
    monkeypatch.setattr(
        LengthGroupedSampler, "__init__", lambda self, *a, **k: (made.append(k), original(self, *a, **k))[1]
    )
    keys = {**KEYS, "method": "seqlora", "output_dir": str(tmp_path / "run"), "train.max_steps": 1}
    keys |= {"train.train_sampling_strategy": "group_by_length"}
    ContinualSequence(load_config(None, keys), kind_tasks("prompt")).run()
    assert len(made) == 2
