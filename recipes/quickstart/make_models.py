"""Make the embedded models: a tiny LLaMA and a tiny T5, trained on text generated here.

    python recipes/quickstart/make_models.py [--out pm_llm/embedded] [--steps 2000]

They are trained on questions about the same little world as the embedded tasks (which words are kind, which belong
together, what animals eat), in other wordings and partly with other answers, so that the tasks are still to be learnt.
Seed 0; about ten minutes on two CPU cores. The files in `pm_llm/embedded` were made by this script with its defaults.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from pm_llm.tasks.benchmarks import embedded as world

SEED, BATCH, LEARNING_RATE = 0, 64, 2e-3
INSTRUCTIONS = [make(random.Random(0))[0] for make in world.MAKERS.values()]


def pair(rng: random.Random) -> tuple[str, str]:
    """A question in another wording than the task's, and its answer: a phrase, or bare where one word is asked for."""
    kind = rng.choice(["mood", "page", "fact", "list", "desk"])
    if kind == "mood":
        _, text, label = world.sentiment(rng)
        ask, phrase, word = "how did they feel ?", "{} people", "happy" if label == "positive" else "sad"
    elif kind == "page":
        _, text, word = world.topic(rng)
        ask, phrase = "on which page is it ?", "the {} page"
    elif kind == "fact":
        animal, which = rng.choice(world.ANIMALS), rng.randrange(3)
        text = rng.choice(["tell me of the {c} {a} and what they {v} .", "{n} wants to know : {a} . they {v} ."])
        verb = ("eat", "live in", "like")[which]
        text = text.format(c=rng.choice(world.COLOURS), a=animal, n=rng.choice(world.NAMES), v=verb)
        ask, phrase, word = "say what you know .", "it is {}", world.FACTS[animal][which]
    elif kind == "list":
        _, text, word = world.puzzle(rng)
        ask, phrase = "read the list .", "it is {}"
    else:
        _, text, word = world.intent(rng)
        ask, phrase = "which desk ?", "the {} desk"
    if rng.random() < 0.5:
        ask, phrase = f"{ask} one word .", "{}"
    return f"{ask}\n{text}\nanswer :", " " + phrase.format(word)


def make_tokenizer(seq2seq: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the generated text; BOS before a decoder's text, end of sequence after an encoder's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(SEED)
    labels = ["positive", "negative"]
    corpus = ["".join(pair(rng)) for _ in range(20000)] + [f" {word}" for word in labels * 50] + INSTRUCTIONS * 50
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    template = {"single": "$A </s>", "pair": "$A $B </s>"} if seq2seq else {"single": "<s> $A", "pair": "<s> $A $B"}
    tokenizer.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_max_length=512
    )


def make_llama(vocabulary: int) -> LlamaForCausalLM:
    """0.9M parameters, 4 layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def make_t5(vocabulary: int) -> T5ForConditionalGeneration:
    """1.3M parameters, 3 + 3 layers."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def batch(tokenizer, seq2seq: bool, rng: random.Random) -> dict[str, torch.Tensor]:
    """A batch of questions and answers; the loss is on the answers only."""
    pairs = [pair(rng) for _ in range(BATCH)]
    questions = [tokenizer(question)["input_ids"] for question, _ in pairs]
    answers = [[*tokenizer(answer, add_special_tokens=False)["input_ids"], 1] for _, answer in pairs]
    if seq2seq:
        rows = [{"input_ids": q, "labels": a} for q, a in zip(questions, answers, strict=True)]
    else:
        rows = [{"input_ids": q + a, "labels": [-100] * len(q) + a} for q, a in zip(questions, answers, strict=True)]
    return dict(DataCollatorForSeq2Seq(tokenizer)(rows))


def train(name: str, steps: int, out: Path) -> None:
    """Train one model and write it with its tokenizer."""
    seq2seq = name == "t5"
    set_seed(SEED)
    tokenizer = make_tokenizer(seq2seq)
    model = (make_t5 if seq2seq else make_llama)(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    rng = random.Random(SEED)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**batch(tokenizer, seq2seq, rng)).loss  # T5 shifts its labels to the right itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"{name} step {step}: loss {loss.item():.3f}", flush=True)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    print(f"{out / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")


def main() -> None:
    """Make both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(world.__file__).parents[1] / "embedded")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--models", nargs="+", default=["llama", "t5"], choices=["llama", "t5"])
    given = parser.parse_args()
    for name in given.models:
        train(name, given.steps, given.out)


if __name__ == "__main__":
    main()
