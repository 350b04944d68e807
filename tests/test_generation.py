"""Answers: packed batches, label scoring and perplexity are those of one row at a time; processes share the rows."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM, set_seed

from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.batches import OVERHEAD, in_batches, pack
from pm_llm.evaluation.generate import common_prefix, generate
from pm_llm.evaluation.likelihood import answer_losses, choose_labels, label_ids, log_likelihoods
from pm_llm.evaluation.predictions import MissingPredictionError, gather, read_predictions
from pm_llm.families.models import load_base
from pm_llm.sections import EvaluationSection
from pm_llm.system.files import jsonl
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, FAMILIES, KINDS, ROOT, make_model, tokenizer
from tests.helpers.launching import launch, launcher


def mixed_rows() -> list[Example]:
    """Rows whose prompts differ much in length, shortest and longest side by side."""
    rows = [*make_task("sentiment", 8, 1).train, *make_task("puzzle", 8, 1).train]
    return [replace(row, body=row.body * (1 + 5 * (i % 3))) for i, row in enumerate(rows)]


@pytest.fixture(scope="module", params=[*FAMILIES, "mistral"])
def answering(request):
    """(model, encoder) of an embedded model, or of a pico Mistral with a sliding window, in float32."""
    if request.param == "mistral":
        set_seed(0)
        sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
        model = MistralForCausalLM(MistralConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=2))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5)  # so that answers depend on more than the last word
        model.generation_config.eos_token_id = [1]
        return model.eval(), Encoder(tokenizer("llama"), DECODER, 160, 6)
    base = load_base(f"embedded:{request.param}")
    return base.model.eval(), Encoder(base.tokenizer, base.family, 160, 6)


def test_packing() -> None:
    lengths = [5, 100, 7, 90, 6, 200, 5]
    batches = pack(lengths, extra=10, rows=3, tokens=250)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [5]  # longest first
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 10) <= 250
    assert pack([300], 10, 8, 100) == [[0]]  # a row over the budget is alone, not lost
    assert pack([], 10, 8, 100) == []
    assert len(pack([1] * 100, 0, 64, 10**6)) == 2


def test_packing_costs_least() -> None:
    """Against all ways to cut eleven sorted rows into batches."""
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.choice([20, 60, 100, 300, 310]) + rng.randrange(40) for _ in range(11)]
        ordered = sorted(lengths, reverse=True)

        def cost(cuts: tuple[int, ...], ordered=ordered) -> int:
            edges = [0, *cuts, len(ordered)]
            return sum((b - a) * ordered[a] + OVERHEAD for a, b in itertools.pairwise(edges))

        ways = (cuts for n in range(11) for cuts in itertools.combinations(range(1, 11), n))
        found = pack(lengths, 0, 64, 10**6)
        assert sum(len(b) * lengths[b[0]] + OVERHEAD for b in found) == min(map(cost, ways))


@pytest.mark.parametrize(("size", "tokens"), [(1, 10**6), (4, 10**6), (64, 300), (64, 10**6)])
def test_generation_is_that_of_one_row_at_a_time(answering, size: int, tokens: int) -> None:
    model, encoder = answering
    rows = mixed_rows()
    lengths = {len(encoder.prompt(row)) for row in rows}
    assert max(lengths) > 3 * min(lengths)
    alone = [generate(model, encoder, [row], 1)[0] for row in rows]
    assert generate(model, encoder, rows, size, tokens) == alone
    assert len(set(alone)) > 2


def tried(model, encoder) -> None:
    """Whether it takes padding is tried once a model, with passes of its own."""
    generate(model, replace(encoder, max_new_tokens=1), make_task("topic", 4, 1).train, 4)


def test_generation_stops_when_all_rows_have_ended(answering, monkeypatch) -> None:
    model, encoder = answering
    tried(model, encoder)
    steps: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    long, rows = replace(encoder, max_new_tokens=20), make_task("topic", 4, 1).train
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(model.config.vocab_size)))
    generate(model, long, rows, 4)
    common = 0 if not encoder.family.shares_prompts else 1  # one more step reads what the prompts begin with
    assert len(steps) == common + 1  # every token ends an answer
    monkeypatch.setattr(model.generation_config, "eos_token_id", [encoder.tokenizer.pad_token_id])
    steps.clear()
    generate(model, long, rows, 4)
    assert len(steps) == common + 20  # none does
    hook.remove()


def reference_log_likelihood(model, encoder, row: Example, ids: list[int]) -> float:
    """From one plain forward pass over prompt and answer, without any cache or padding."""
    prompt = encoder.prompt(row)
    with torch.no_grad():
        if not encoder.family.shares_prompts:
            logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([ids])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


def test_what_prompts_begin_with_is_read_once(answering) -> None:
    model, encoder = answering
    tried(model, encoder)
    read: list[int] = []
    reader = (model.get_encoder() if not encoder.family.shares_prompts else model).get_input_embeddings()
    hook = reader.register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
    rows = make_task("topic", 16, 1).train
    prompts = [encoder.prompt(row) for row in rows]
    common = common_prefix(prompts)
    assert common > 5
    generate(model, replace(encoder, max_new_tokens=1), rows, 16)
    whole = 16 * max(map(len, prompts))
    batches = pack([len(ids) for ids in prompts], 1, 16, 8192)
    padded = sum(len(batch) * len(prompts[batch[0]]) for batch in batches)
    assert padded <= whole
    if not encoder.family.shares_prompts:
        assert sum(read) == padded
    elif isinstance(model, MistralForCausalLM):
        assert sum(read) == padded + common  # looked at, and found to have a window
    else:
        assert sum(read) <= padded - 16 * common + 16 * 8 + common
    hook.remove()


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4], [1, 2, 5]]) == 1  # each keeps a token of its own
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[3], [1]]) == 0
    assert common_prefix([[1, 2, 3]]) == 0


DORA = partial(LoraConfig, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, IA3Config, LoHaConfig, DORA])
def test_any_kind_of_adapter(config, pico_folders, tmp_path, capsys) -> None:
    """`pm-llm evaluate` gives what PEFT itself generates row by row, for adapters that are not LoRA either."""
    options = {"num_virtual_tokens": 4} if config in (PromptTuningConfig, PrefixTuningConfig) else {}
    set_seed(1)
    model = get_peft_model(make_model("llama"), config(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["evaluate", "--model", pico_folders["llama"], "--adapter", str(tmp_path / "adapter")]
    arguments += ["--benchmark", "embedded", "--order", "topic", "--max_test_samples", "6", "--max_length", "96"]
    assert main([*arguments, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    found = read_predictions(tmp_path / "p.jsonl")["topic"].predictions
    task = make_task("topic").subset(None, 6, 0)
    encoder = Encoder(
        tokenizer("llama"),
        DECODER,
        96,
        DECODER.answer_length(Encoder(tokenizer("llama"), DECODER, 96, 1), task.train, None),
    )
    alone = PeftModel.from_pretrained(load_base(pico_folders["llama"]).model, str(tmp_path / "adapter")).eval()
    for row, said in zip(task.test, found, strict=True):
        ids = torch.tensor([encoder.prompt(row)])
        output = alone.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=encoder.max_new_tokens, do_sample=False
        )
        assert encoder.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip() == said
    if options:
        assert main([*arguments, "--evaluation.mode", "labels"]) == 2
        assert "virtual tokens" in capsys.readouterr().err
    else:
        assert main([*arguments, "--evaluation.mode", "labels"]) == 0


@pytest.mark.parametrize("size", [1, 5])
def test_options_with_a_shared_cache_score_as_whole_sequences(answering, size: int) -> None:
    model, encoder = answering
    rows = mixed_rows()
    labels = ["positive", "negative", "green", "a cat and a dog"]
    options = [[encoder.whole_answer(replace(row, completion=label)) for label in labels] for row in rows]
    assert len({len(ids) for ids in options[0]}) > 1  # options of unequal length
    found = log_likelihoods(model, encoder, rows, options, size)
    for row, ids, scores in zip(rows, options, found, strict=True):
        expected = [reference_log_likelihood(model, encoder, row, one) for one in ids]
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_out_labels_that_cannot_win_changes_nothing(family: str) -> None:
    """Labels whose first tokens are no hint of the whole, on a model of random weights."""
    model, encoder = make_model(family).eval(), Encoder(tokenizer(family), KINDS[family], 160, 6)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # or all tokens would be about as likely
    rows, labels = mixed_rows(), ["xq vz", "kj wq", "zz qq", "vv xj", "jq kz", "wx vq"]
    options = [label_ids(encoder, row, labels) for row in rows]
    assert {len(ids) for ids in options[0]} != {1}
    full = log_likelihoods(model, encoder, rows, options, 5)
    best = [max(range(6), key=scores.__getitem__) for scores in full]
    assert choose_labels(model, encoder, rows, labels, 5) == [labels[i] for i in best]
    firsts = log_likelihoods(model, encoder, rows, [[ids[:1] for ids in row] for row in options], 5)
    likeliest = [max(range(6), key=scores.__getitem__) for scores in firsts]
    assert best != likeliest


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_sequence_counts_where_one_label_begins_with_another(family: str) -> None:
    encoder = Encoder(tokenizer(family), KINDS[family], 160, 6)
    row, end = mixed_rows()[0], encoder.tokenizer.eos_token_id
    assert all(ids[-1] != end for ids in label_ids(encoder, row, ["positive", "negative", "a cat"]))
    assert all(ids[-1] == end for ids in label_ids(encoder, row, ["a cat", "a cat and a dog", "dog"]))
    assert all(ids[-1] == end for ids in label_ids(encoder, row, ["dog", "dog"]))


def test_perplexity_is_that_of_the_plain_loss(answering) -> None:
    model, encoder = answering
    rows = mixed_rows()
    losses, tokens = answer_losses(model, encoder, rows, 4)
    for row, loss, n in zip(rows, losses, tokens, strict=True):
        ids = encoder.answer(row)
        assert n == len(ids)
        assert -loss == pytest.approx(reference_log_likelihood(model, encoder, row, ids), abs=1e-4)
    task = Task("a", rows, rows, "perplexity")
    found = answer_task(model, encoder, task, EvaluationSection())
    assert found.score() == pytest.approx(torch.tensor(sum(losses) / sum(tokens)).exp().item())


def test_label_mode_answers_with_labels_only(answering) -> None:
    model, encoder = answering
    task = make_task("intent", 8, 12)
    found = answer_task(model, encoder, task, EvaluationSection(mode="labels"))
    assert set(found.predictions) <= set(task.labels)
    free = replace(task, labels=())  # without labels there is nothing to choose from
    assert answer_task(model, encoder, free, EvaluationSection(mode="labels")).predictions == generate(
        model, encoder, task.test, 8
    )


def test_white_space_around_labels_does_not_count(answering) -> None:
    """`accuracy` compares answers as they stand, and references have none."""
    model, encoder = answering
    task = replace(make_task("intent", 8, 12), scorer="accuracy")
    bare = answer_task(model, encoder, task, EvaluationSection(mode="labels"))
    rows = [replace(row, completion=f" {row.completion}") for row in task.test]
    spaced = replace(task, test=rows, labels=tuple(f" {label}" for label in task.labels))
    found = answer_task(model, encoder, spaced, EvaluationSection(mode="labels"))
    assert set(found.predictions) <= set(task.labels)
    assert found.predictions == bare.predictions
    assert found.score() == bare.score()


# ---- predictions on disk ----
def test_scores_follow_from_the_file_alone(answering, tmp_path) -> None:
    model, encoder = answering
    rows = [replace(row, alternatives=("x y",), source="a source") for row in mixed_rows()]
    for scorer in ("exact_match", "rougeL", "sari", "perplexity"):
        found = answer_task(model, encoder, Task("a", rows, rows, scorer), EvaluationSection())
        (tmp_path / "p.jsonl").write_bytes(jsonl(found.lines()))
        (again,) = read_predictions(tmp_path / "p.jsonl").values()
        assert again.score() == found.score()
    assert answer_task(model, encoder, Task("a", rows, rows), EvaluationSection()).score("token_f1") >= 0


@pytest.mark.parametrize("row", [0, 3, 7])
def test_a_missing_row_raises(row: int, tmp_path) -> None:
    lines = [
        {"task": "a", "scorer": "exact_match", "row": i, "of": 8, "prediction": "x", "references": ["x"]}
        for i in range(8)
    ]
    assert gather(lines)["a"].score() == 100
    with pytest.raises(MissingPredictionError, match=rf"1 of 8 predictions of task 'a' are missing \(row {row}\)"):
        gather(lines[:row] + lines[row + 1 :])
    with pytest.raises(MissingPredictionError, match=f"row {row} of task 'a' occurs twice"):
        gather([*lines, lines[row]])
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:-1]) + '{"task": ')
    with pytest.raises(PmLlmError, match=r"p\.jsonl cannot be read as predictions"):
        read_predictions(tmp_path / "p.jsonl")


def test_an_answer_that_does_not_come_back_raises(monkeypatch) -> None:
    with pytest.raises(ValueError, match="zip"):
        in_batches([[0, 1]], lambda batch: ["only one"])
    import pm_llm.evaluation.batches as batches

    monkeypatch.setattr(batches, "gather_object", lambda rows: rows[:-1])
    with pytest.raises(RuntimeError, match="1 answers came back for 2 rows"):
        in_batches([[0], [1]], lambda batch: ["x"])
    monkeypatch.setattr(batches, "gather_object", lambda rows: [*rows, rows[0]])
    with pytest.raises(RuntimeError, match="3 answers came back for 2 rows"):
        in_batches([[0], [1]], lambda batch: ["x"])


SCRIPT = """
import json, sys
from pm_llm.evaluation.generate import common_prefix, generate
from pm_llm.evaluation.likelihood import choose_labels
from pm_llm.families.models import load_base
from pm_llm.system.processes import process_state, shut_down
from pm_llm.tasks.encoding import Encoder
from tests.conftest import FAMILIES
from tests.test_generation import mixed_rows

state = process_state()
for family in FAMILIES:
    base = load_base(f"embedded:{family}")
    model, encoder = base.model.eval(), Encoder(base.tokenizer, base.family, 160, 6)
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append(1))
    for rows in (mixed_rows(), mixed_rows()[:1]):
        calls.clear()
        said = generate(model, encoder, rows, 3)
        chosen = choose_labels(model, encoder, rows, ["positive", "negative"], 3)
        found = [state.process_index, state.num_processes, len(calls), said, chosen]
        name = f"{sys.argv[1]}/{family}-{state.num_processes}-{state.process_index}-{len(rows)}.json"
        open(name, "w").write(json.dumps(found))
shut_down()
"""


@pytest.mark.slow
def test_evaluate_under_a_launcher(tmp_path, capsys) -> None:
    """As in the docs: two processes, one set of lines, one file, the scores of one process."""
    arguments = ["evaluate", "--model", "embedded:llama", "--benchmark", "embedded", "--order", "topic,intent"]
    arguments += ["--max_test_samples", "21", "--max_length", "96"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "accelerate_configs/ddp_cpu.yaml"), "-m", "pm_llm.cli"]
    whole = [*launch, *arguments, "--predictions", str(tmp_path / "two.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--predictions", str(tmp_path / "one.jsonl")]) == 0
    said = [[x for x in text.splitlines() if "\t" in x] for text in (done.stdout, capsys.readouterr().out)]
    assert said[0] == said[1]
    assert len(said[0]) == 3
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_share_the_rows_and_agree(forker, tmp_path) -> None:
    """16 rows in batches of 3 make six batches for two processes; then one row, so that one has nothing to do."""
    script = tmp_path / "answer.py"
    script.write_text(SCRIPT)
    two = launch(forker, [*launcher("ddp_cpu", tmp_path, str(script)), str(tmp_path)], kill=200.0)
    one = forker(script, tmp_path, what="script", kill=200.0)
    for ended in (two, one):
        assert ended.status == 0, ended.said
    for family, rows in itertools.product(FAMILIES, (16, 1)):
        alone, *shares = (
            json.loads((tmp_path / f"{family}-{name}-{rows}.json").read_text()) for name in ("1-0", "2-0", "2-1")
        )
        assert [share[:2] for share in (alone, *shares)] == [[0, 1], [0, 2], [1, 2]]
        assert all(share[3:] == alone[3:] for share in shares)
        assert len(alone[3]) == rows
        if rows == 16:
            assert all(0 < share[2] < alone[2] for share in shares)
        else:
            assert shares[1][2] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_is_one_by_one_generation(family: str) -> None:
    model = load_base(f"embedded:{family}").model.eval()
    encoder = Encoder(tokenizer(family), KINDS[family], 64, 6)
    rows = [*make_task("sentiment", 6, 1).train, *make_task("puzzle", 6, 1).train]
    together = generate(model, encoder, rows, batch_size=5)
    alone = [generate(model, encoder, [row], batch_size=1)[0] for row in rows]
    assert together == alone
    assert len(set(alone)) > 1
