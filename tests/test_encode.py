"""Rendering: the chat template, the answer frame that survives shortening, and rows that cannot be rendered."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from pm_llm.cli import main
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.encoding import Encoder, encoder_for
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks
from pm_llm.tasks.order import blurred
from tests.conftest import DECODER, FAMILIES, KINDS, tokenizer
from tests.helpers.tasks import user_tasks, write

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_goes_through_the_template_with_loss_on_the_answer(family: str, tmp_path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what does the cat eat ?"},
        {"role": "assistant", "content": "fish"},
    ]
    Dataset.from_list([{"messages": turns}] * 20).to_json(str(tmp_path / "chat.jsonl"))
    (task,) = user_tasks(str(tmp_path / "chat.jsonl"))
    row = task.train[0]
    t = tokenizer(family)
    encoder = Encoder(t, KINDS[family], 64, 8)
    with pytest.raises(PmLlmError, match="no chat template"):
        encoder.prompt(row)
    t.chat_template = TEMPLATE
    prompt, answer = t.decode(encoder.prompt(row)), t.decode(encoder.answer(row))
    assert prompt == "<system> be brief\n<user> what does the cat eat ?\n<assistant> "
    assert answer == "fish</s>"
    (features,) = encoder.features([row])
    loss_on = [i for i in features["labels"] if i != -100]
    assert t.decode(loss_on) == "fish</s>"
    short = Encoder(t, KINDS[family], 30 if family == "t5" else 38, 8)
    assert t.decode(short.prompt(row)).endswith("<assistant> ")
    assert len(short.prompt(row)) <= 30


def test_what_a_template_puts_before_an_answer_is_no_part_of_it() -> None:
    """Qwen3's last turn begins with empty thoughts that its generation prompt lacks."""
    t = tokenizer("llama")
    t.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' and 'so :' not in m.content %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    turns = ({"role": "user", "content": "what does the cat eat ?"},)
    encoder = Encoder(t, DECODER, 96, 24)
    for answer, between in (("fish", "<think>\n\n</think>\n\n"), ("so : fish", "")):
        row = Example("", answer, messages=turns)
        assert t.decode(encoder.prompt(row)) == "<user> what does the cat eat ?\n<assistant> " + between
        assert t.decode(encoder.answer(row)) == answer + "</s>"
        (features,) = encoder.features([row])
        assert t.decode([i for i in features["labels"] if i != -100]) == answer + "</s>"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [24, 31, 40])
def test_the_answer_frame_survives(family: str, length: int) -> None:
    t = tokenizer(family)
    row = Example("word " * 300, "positive", "what is the sentiment ?\n", "\nanswer :")
    encoder = Encoder(t, KINDS[family], length, 5)
    ids = encoder.prompt(row)
    text = t.decode(ids, skip_special_tokens=True)
    assert len(ids) <= encoder.prompt_budget
    assert len(ids) >= encoder.prompt_budget - 3  # and no more was cut than needed
    assert text.startswith("what is the sentiment ?\nword")
    assert text.endswith("\nanswer :")
    (features,) = encoder.features([row])
    assert len(features["input_ids"]) <= length
    with pytest.raises(PmLlmError, match="Raise max_length"):
        Encoder(t, KINDS[family], 8, 2).prompt(row)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_frame_loses_its_middle(family: str) -> None:
    t = tokenizer(family)
    row = Example("read this : " + "word " * 300 + "\nwhat does the cat eat ?\nanswer :", "fish")
    text = t.decode(Encoder(t, KINDS[family], 48, 5).prompt(row), skip_special_tokens=True)
    assert text.startswith("read this : word")
    assert text.endswith("word \nwhat does the cat eat ?\nanswer :")


def test_rows_that_cannot_be_rendered_are_told_before_anything_is_done(pico_folders, tmp_path, capsys) -> None:
    """A frame that is too long, and a conversation that the chat template refuses: file and line of each."""
    rows = [{"label": "A", "sentence": "x"}] * 3
    write(tmp_path / "cl", "TC", "agnews", ["A", "B" * 400], rows)
    write(tmp_path / "cl", "COPA", "COPA", ["A"], rows)
    run = ["run", "--model", pico_folders["llama"], "--output_dir", str(tmp_path / "run"), "--max_length", "60"]
    benchmark = ["--benchmark", "standard_cl", "--order", "COPA,agnews", "--data-dir", str(tmp_path / "cl")]
    assert main([*run, *benchmark]) == 2
    said = capsys.readouterr().err
    assert said.count("without what may be cut its prompt has") == 9
    assert f"{tmp_path / 'cl/TC/agnews/test.json'}:1 (row 3): " in said
    assert "COPA/train" not in said

    folder = tmp_path / "model"
    shutil.copytree(pico_folders["llama"], folder)
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + "{{ m.content }}{% endfor %}")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats = [[{"role": "system", "content": "s"}, *turns] if i in (3, 5) else turns for i in range(12)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    run[run.index("--model") + 1] = str(folder)
    assert main([*run, "--tasks", str(tmp_path / "c.jsonl")]) == 2
    said = capsys.readouterr().err
    assert [f"c.jsonl:{n}: the model's chat template refuses it: no system turns" in said for n in (4, 6)] == [
        True
    ] * 2
    assert "2 things are wrong" in said
    assert not (tmp_path / "run").exists()


def test_answers_that_leave_no_room_for_prompts() -> None:
    task = Task("a", [Example("x", "word " * 60)], [Example("x", "y")])
    with pytest.raises(PmLlmError, match=r"task 'a': answers of \d+ tokens leave none of max_length 50 for prompts"):
        encoder_for(tokenizer("llama"), DECODER, task, 50, None)
    assert encoder_for(tokenizer("llama"), DECODER, task, 50, 10).prompt_budget == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_longest_answer(family: str) -> None:
    t = tokenizer(family)
    task = make_task("topic", 50, 2)
    glue = " " if family == "llama" else ""
    expected = max(len(t(glue + row.completion, add_special_tokens=False)["input_ids"]) for row in task.train) + 1
    assert KINDS[family].answer_length(Encoder(t, KINDS[family], 96, 1), task.train, None) == expected


def test_rows_that_neighbours_train_on_are_looked_at(pico_folders, tmp_path) -> None:
    tasks = [make_task(name, 12, 2) for name in ("topic", "question")]
    config = RunConfig(model=pico_folders["llama"], max_length=40, blur=0.5)
    long = [replace(row, head=f"{number} " + "word " * 60) for number, row in enumerate(tasks[1].train)]
    mixed = blurred([tasks[0], replace(tasks[1], train=long)], config.blur, 0)
    given = len(mixed[0].foreign[0][1])
    assert 0 < given < 12
    with pytest.raises(PmLlmError, match="12 things are wrong"):
        encoders_for(config, mixed)


def test_an_answer_that_brings_its_end_is_trained_and_scored_once() -> None:
    t = tokenizer("llama")
    encoder = Encoder(t, DECODER, 96, 24)
    with_end, plain = Example("is it ?", "the cat</s>"), Example("is it ?", "the cat")
    assert encoder.answer(with_end) == encoder.answer(plain)
    assert encoder.reference(with_end, with_end.completion) == "the cat"
    assert encoder.said(with_end, encoder.prompt(with_end), encoder.answer(with_end)) == "the cat"


def test_blanks_before_and_inside_an_answer_are_content() -> None:
    t = tokenizer("llama")
    encoder = Encoder(t, DECODER, 96, 40)
    row = Example("def f(x):\n", "    y = x\n    return y\n")
    assert t.decode(encoder.answer(row)) == row.completion + "</s>"
    assert encoder.reference(row, row.completion) == row.completion.rstrip()
    assert encoder.said(row, encoder.prompt(row), encoder.answer(row)) == row.completion.rstrip()
    assert encoder.said(row, encoder.prompt(row), t("y = x", add_special_tokens=False)["input_ids"]) == "y = x"
    framed = Example("x", " yes\n", tail="\nanswer :")
    assert t.decode(encoder.answer(framed)) == " yes</s>"


def test_the_text_of_a_special_token_is_told_or_taken_as_the_task_says(pico_folders, tmp_path) -> None:
    t = tokenizer("llama")
    row = Example("what ends </s> html ?", "the tag </s> ends it")
    eos = t.eos_token_id
    as_text, as_token = (Encoder(t, DECODER, 96, 40, special_tokens=kind) for kind in ("text", "token"))
    assert eos not in as_text.prompt(row)
    assert as_text.answer(row).count(eos) == 1
    assert t.decode(as_text.answer(row)[:-1]) == " the tag </s> ends it"
    assert as_token.answer(row).count(eos) == 2
    (tmp_path / "a.jsonl").write_text((json.dumps({"prompt": row.body, "completion": "x"}) + "\n") * 12)
    for kind, fails in ((None, True), ("text", False), ("token", False)):
        config = RunConfig(
            model=pico_folders["llama"], tasks=[{"data": str(tmp_path / "a.jsonl"), "special_tokens": kind}]
        )
        tasks = load_tasks(config)
        if fails:
            with pytest.raises(PmLlmError, match=r"special token '</s>'\. Say what that is"):
                encoders_for(config, tasks)
        else:
            encoders_for(config, tasks)


def trained_tokenizer(kind: str):
    """Small real tokenizers of the kinds that put a blank before every text, or break characters into bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        "what does the cat eat ? answer : fish and meat",
        "def f ( x ) : return y",
        "\n    \n",
        "猫は魚を食べます。",
    ]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=290, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "normaliser":  # Llama 2's own
            tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that no merge goes over a blank
        else:
            tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tok.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *alphabet])
    tok.train_from_iterator(texts * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["normaliser", "metaspace", "bytes"])
def test_an_answer_goes_on_from_its_prompt_as_one_text_would(kind: str) -> None:
    t = trained_tokenizer(kind)
    encoder, alike = Encoder(t, DECODER, 200, 40), 0
    for row in (
        Example("what does the cat eat ?", "fish"),
        Example("what does the cat eat ?\nanswer :", "fish and meat"),
        Example("def f ( x ) :\n", "    return y"),
        Example("def f ( x ) :\n", "return y"),
    ):
        whole = t(row.prompt + encoder.family.lead(row) + row.completion, add_special_tokens=False)["input_ids"]
        if whole[: len(encoder.prompt(row))] == encoder.prompt(row):  # no token stands over the border
            assert encoder.prompt(row) + encoder.answer(row)[:-1] == whole
            alike += 1
        assert encoder.said(row, encoder.prompt(row), encoder.answer(row)) == row.completion.rstrip()
    assert alike >= 3


def test_shortening_cuts_between_characters() -> None:
    t = trained_tokenizer("bytes")
    encoder = Encoder(t, DECODER, 40, 4)
    for length in range(30, 60):
        text = t.decode(encoder.prompt(Example("魚猫食" * length, "x")))
        assert "\ufffd" not in text
        assert len(t(text)["input_ids"]) >= encoder.prompt_budget - 6


def test_characters_that_the_vocabulary_lacks_are_told(pico_folders, tmp_path, capsys, monkeypatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "is", "it", "yes", "no", "?"])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    t = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    monkeypatch.setattr("pm_llm.families.models.load_tokenizer", lambda name: (t, DECODER))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": "is it ?", "completion": "{yes}" if i == 2 else "no"}) + "\n" for i in range(20))
    )
    config = RunConfig(tasks=[str(tmp_path / "a.jsonl")])
    encoders_for(config, load_tasks(config))
    said = capsys.readouterr().out
    assert "task 'a': 1 of 20 rows hold characters that the model's vocabulary lacks" in said
    assert "a.jsonl:3: it sees <unk>" in said


def test_a_reference_counts_as_the_tokenizer_writes_it() -> None:
    from pm_llm.evaluation.answering import _references

    t = tokenizer("llama")
    encoder, row = Encoder(t, DECODER, 96, 40), Example("x", "ＡＢＣ")
    assert _references(encoder, row) == ["ＡＢＣ"]  # which this one leaves as it is
    from tokenizers import normalizers

    t.backend_tokenizer.normalizer = normalizers.NFKC()
    assert _references(Encoder(t, DECODER, 96, 40), row) == ["ＡＢＣ", "ABC"]
