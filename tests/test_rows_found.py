"""What a critical reader found of rows of all kinds; each was a fault."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset

from pm_llm import ContinualSequence, PmLlmError, Task, mean_loss, measure
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.evaluation.answering import _references
from pm_llm.evaluation.matrix import Matrix
from pm_llm.families.packing import Packing
from pm_llm.families.rows import table_of
from pm_llm.run.going_on import changes
from pm_llm.run.kept import read_kept, write_kept
from pm_llm.tasks import store
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, make_peft, tokenizer
from tests.helpers.kinds import kind_tasks, of_kind
from tests.helpers.presets import KEYS

H = "\n\nHuman: are you sure?\n\nAssistant: "


def pair(chosen, rejected, **more) -> Example:
    return Task.from_rows("t", [{"chosen": chosen, "rejected": rejected, **more}] * 10).train[0]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [("I think so.", "I thought so.", ("think so.", "thought so.")), ("yes", "yes, I am", ("yes", "yes, I am"))],
)
def test_a_prompt_in_both_answers_is_cut_between_words(chosen: str, rejected: str, said: tuple) -> None:
    row = pair(H + chosen, H + rejected)
    assert (row.completion, row.rejected) == said
    (one,) = DECODER.of("preference").features(Encoder(tokenizer("llama"), DECODER.of("preference"), 99, 20), [row])
    whole = tokenizer("llama").decode(one["prompt_ids"] + one["chosen_ids"], skip_special_tokens=True)
    assert whole == H + chosen


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        ("", "b", "begin with no common prompt"),
        ("abc", "abd", "begin with no common prompt"),
        ([], [turn("user", "a")], "begin with no common prompt"),
        ([turn("user", "a")], "b", "two texts, or two lists"),
    ],
)
def test_pairs_without_a_prompt_are_told(chosen, rejected, said: str) -> None:
    with pytest.raises(PmLlmError, match=said):
        pair(chosen, rejected)


def test_a_call_in_a_pair_is_refused() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    with pytest.raises(PmLlmError, match="an answer of a pair is a tool call"):
        pair([turn("user", "q"), call], [turn("user", "q"), turn("assistant", "no")])


def test_what_was_said_before_and_prompts_beside_turns_are_used_once() -> None:
    yes, no, asked = [turn("assistant", "yes")], [turn("assistant", "no")], [turn("user", "hi")]
    for prompt, front in (("hi", []), (asked, []), (asked, asked), ("hi", asked)):
        row = pair([*front, *yes], [*front, *no], prompt=prompt, system="be kind")
        assert row.messages == (turn("system", "be kind"), turn("user", "hi")), (prompt, front)
    rows = [{"system": "be kind", "prompt": asked, "completion": yes}] * 10
    assert Task.from_rows("t", rows).train[0].messages == (turn("system", "be kind"), turn("user", "hi"))


def test_what_is_ignored_is_not_used() -> None:
    chat = {"messages": [turn("user", "q"), turn("assistant", "a")], "tools": [{"type": "function", "function": {}}]}
    assert Task.from_rows("t", [chat] * 10, ignore=["tools"]).train[0].tools == ()
    plain = {"instruction": "do", "input": "secret", "output": "x", "system": "S", "history": [["a", "b"]]}
    row = Task.from_rows("t", [plain] * 10, ignore=["input", "system", "history"]).train[0]
    assert (row.body, row.messages) == ("do", None)
    lists = {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")], "tools": chat["tools"]}
    assert Task.from_rows("t", [lists] * 10).train[0].tools == tuple(chat["tools"])


def test_calls_that_cannot_be_read_are_not_scored_as_right() -> None:
    one = tokenizer("llama")
    one.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% for c in m.tool_calls or [] %}"
        "call {{ c.function.name }} {{ c.function.arguments.values() | join }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
    row = Example("", "x", messages=(turn("user", "q"),), turn={**turn("assistant", ""), "tool_calls": [call]})
    with pytest.raises(PmLlmError, match="which scorer tool_call cannot read"):
        _references(Encoder(one, DECODER, 99, 20), row, "tool_call")
    assert _references(Encoder(one, DECODER, 99, 20), row, "accuracy")


def test_fuar_looks_at_each_scores_own_direction() -> None:
    scores = {
        (i, j): x
        for j, column in enumerate(([60, 55, 40], [10, 20, 50], [5, 10, 40]))
        for i, x in zip((-1, 0, 1), column, strict=True)
    }
    matrix = Matrix(["kept", "updated", "acquired", "a", "b"], scores, ["a", "b"], lower_is_better=True)
    matrix.lower = frozenset("ab")
    assert matrix.fuar(["kept", "kept"], "updated", "acquired") == pytest.approx(35 / 135)


def test_a_finished_task_keeps_its_kind(tmp_path) -> None:
    task = of_kind("preference", "topic")
    write_kept(tmp_path, task, 3, "a", "b")
    (tmp_path / "test_rows.jsonl").unlink()
    assert read_kept(tmp_path).kind == "preference"


def test_a_run_of_pairs_goes_on_without_their_rows(tmp_path) -> None:
    keys = {**KEYS, "method": "replay", "keep_test_rows": False, "output_dir": str(tmp_path / "run")}
    tasks = kind_tasks("preference")
    ContinualSequence(load_config(None, keys), tasks[:1]).run()
    run = ContinualSequence.open(tmp_path / "run")
    with pytest.raises(PmLlmError, match="preference pairs have a Trainer of their own"):
        run.add(of_kind("text", "topic"))
    assert ContinualSequence.open(tmp_path / "run").add(tasks[1])["stages"] == ["sentiment", "topic"]


def prepending() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before every text."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁hello", "▁you", "▁hi", "[", "/", "I", "]", "▁fine", "▁[", *"helloyufin"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner = Tokenizer(models.Unigram([(word, -float(len(word) < 2)) for word in vocabulary], 2))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Replace("▁", " ")
    found = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} {{ m.content }} </s>"
        "{% endif %}{% endfor %}"
    )
    return found


def test_earlier_turns_have_the_tokens_of_the_whole_conversation() -> None:
    one = prepending()
    turns = (turn("user", "hi"), turn("assistant", "hello you"), turn("user", "hi"))
    row = Example("", "fine", messages=turns)
    ours, last = (Encoder(one, DECODER, 99, 20, loss_on=how) for how in ("assistant", "last"))
    assert ours.prompt(row) == last.prompt(row)
    _, labels = ours.asked(row)
    assert one.convert_ids_to_tokens([x for x in labels if x != -100])[:2] == ["▁hello", "▁you"]


def test_a_column_that_some_rows_have_is_kept() -> None:
    rows = [
        {"input_ids": [2, 5], "labels": [-100, 5]},
        {"input_ids": [2, 5, 2, 6], "labels": [-100, 5, -100, 6], "seq_lengths": [2, 2]},
    ]
    table = table_of(rows)
    assert table["seq_lengths"][1] == [2, 2]
    model = make_peft("llama", random_b=True)
    batch = Packing(tokenizer("llama"), model)(table.to_list())
    assert batch["position_ids"][1].tolist() == [0, 1, 0, 1]


def test_keys_that_runs_of_before_do_not_have_change_nothing() -> None:
    now = load_config(None, {}).plain()
    before = json.loads(json.dumps(now))
    for key in ("packing", "train_sampling_strategy", "beta"):
        del before["train"][key]
    del before["attn_implementation"]
    assert changes(before, now) == []
    assert changes(before, load_config(None, {"train.packing": True}).plain()) == ["train.packing: None -> True"]


def test_a_fisher_of_blocks_and_of_pairs_in_one_call() -> None:
    model, one = make_peft("llama", random_b=True), tokenizer("llama")
    rows = Encoder(one, DECODER, 96, 8).features(of_kind("prompt", "topic", train=2).train)
    block = pack_dataset(Dataset.from_list(rows), 96, "bfd")
    assert mean_loss(model, block, one) == pytest.approx(2 * mean_loss(model, rows, one), rel=1e-5)
    task = of_kind("preference", "topic")
    with pytest.raises(PmLlmError, match="needs what the model before the task gave"):
        measure(model, task, one)
    pairs = DECODER.of("preference")
    rows = pairs.referenced(model, one, pairs.features(Encoder(one, pairs, 96, 8), task.train), 4)
    found = measure(model, Dataset.from_list(rows), one, form="dense", samples=4)
    assert all(torch.isfinite(x.F).all() for x in found.modules.values())


def test_datasets_of_other_formats_are_read_as_what_they_hold() -> None:
    rows = Dataset.from_dict({"prompt": [f"q {i}" for i in range(10)], "completion": list(range(10))})
    for kind in ("torch", "numpy", "pandas"):
        assert Task.from_dataset("t", rows.with_format(kind), rows).train[3].completion == "3"
    numbered = rows.add_column("idx", list(range(10)))
    assert len(Task.from_dataset("t", numbered, rows).train) == 10
    for given in (DatasetDict(train=rows), (x for x in rows)):
        with pytest.raises(PmLlmError, match="is no dataset of rows"):
            Task.from_dataset("t", given)


def test_what_cannot_work_later_is_told_before_the_first_task(tmp_path) -> None:
    tasks = [of_kind("prompt", "topic"), of_kind("preference", "sentiment")]
    for keys, said in (
        ({"train.packing": True}, "preference pairs cannot be packed"),
        ({"train.train_sampling_strategy": "group_by_length"}, "preference pairs cannot be grouped"),
    ):
        run = ContinualSequence(load_config(None, {**KEYS, **keys, "output_dir": str(tmp_path / "run")}), tasks)
        with pytest.raises(PmLlmError, match=said):
            run.run()
        assert run.run_dir.state()["stages"] == []


def test_rows_of_a_task_that_may_not_be_kept_are_not_kept_on_disk_either(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "LIMIT", 8)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("one", "two"):
        rows = [{"prompt": f"{name} {i} ?", "completion": "yes"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    keys = {**KEYS, "tasks": files, "keep_test_rows": False, "max_test_samples": 2, "method": "seqlora"}
    ContinualSequence(load_config(None, {**keys, "output_dir": str(tmp_path / "run")})).run()
    assert list((tmp_path / "cache/pm_llm").iterdir()) == []


def test_a_file_that_was_changed_with_its_time_kept_is_read_again(tmp_path, monkeypatch) -> None:
    import os

    monkeypatch.setattr(store, "LIMIT", 8)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file, before = tmp_path / "a.jsonl", None
    for answer in ("yes", "nay"):
        rows = [{"prompt": f"{i} ?", "completion": answer} for i in range(20)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if before is not None:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        before = file.stat()
        (task,) = load_config_tasks(str(file))
        assert {row.completion for row in task.train} == {answer}


def load_config_tasks(file: str) -> list[Task]:
    from pm_llm import RunConfig, load_tasks

    return load_tasks(RunConfig(tasks=[file]))


def test_tokens_of_cut_documents_are_counted_once(tmp_path, capsys) -> None:
    text = " ".join(f"word {i} ." for i in range(20))
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": text}) + "\n") * 10)
    size = len(DECODER.of("text").document(Encoder(tokenizer("llama"), DECODER.of("text"), 16, 1), Example("", text)))
    assert main(["tasks", "check", str(tmp_path / "a.jsonl"), "--max_length", "16"]) == 0
    said = capsys.readouterr().out
    assert f"9 documents, {9 * size:,} tokens" in said
    assert f"{9 * (size - 1):,} of {9 * size:,} tokens carry loss" in said
    assert said.count("[[") == 3
