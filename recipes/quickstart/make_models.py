"""Make the embedded models: a tiny LLaMA and a tiny T5, trained on text generated here.

    python recipes/quickstart/make_models.py [--out pm_llm/embedded] [--steps 4000]

They are trained on questions about the same little world as the embedded tasks (which words are kind, which belong
together, what animals eat), in other wordings and partly with other answers, so that the tasks are still to be learnt.
Seed 0; about ten minutes a model on one CPU core. The files in `pm_llm/embedded` were made by this script with its
defaults.
"""

from __future__ import annotations

import argparse
import random
from itertools import chain
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


# what is asked of a text -> wordings, and the answer words for each label; the tasks' own wordings are none of them
ASKED: dict[str, list[tuple[list[str], dict[str, str] | None]]] = {
    "mood": [
        (["how did they feel ?", "say the mood ."], {"positive": "happy", "negative": "sad"}),
        (["good or bad ?", "was it good ? or bad ?"], {"positive": "good", "negative": "bad"}),
        (["thumb up or down ?", "up or down ?"], {"positive": "up", "negative": "down"}),
        (["positive or negative ?", "negative or positive ?", "is this positive or negative ?"], None),
    ],
    "page": [
        (["on which page is it ?", "which page ?", "sport , music , science or food ?", "the page of this ?"], None),
        (["who reads it ?"], {"sport": "players", "music": "dancers", "science": "students", "food": "cooks"}),
        (["where was it ?"], {"sport": "field", "music": "hall", "science": "school", "food": "table"}),
    ],
    "desk": [
        (["which desk ?", "to whom does it go ?", "refund , repair , delivery or advice ?"], None),
        (["who helps ?"], {"refund": "bank", "repair": "smith", "delivery": "driver", "advice": "friend"}),
        (["what is sent ?"], {"refund": "coins", "repair": "tools", "delivery": "box", "advice": "letter"}),
    ],
}
KINDS = ["mood", "mood", "page", "page", "desk", "desk", "fact", "fact", "fact", "list", "word", "place"]
LABELLED = {"mood": world.sentiment, "page": world.topic, "desk": world.intent}
TOLD = [
    "tell me of the {c} {a} and what they {v} .",
    "{n} wants to know : {a} . they {v} .",
    "what will the {a} {v} , {n} ?",
    "a {o} , and a {a} . the {a} does {v} this .",
    "all {c} ones of them {v} it : the {a} .",
    "what do you {v} , {a} ?",
]
GROUPS = {
    "colour": world.COLOURS,
    "animal": world.ANIMALS,
    "name": world.NAMES,
    "thing": world.THINGS,
    "praise": world.GOOD,
}
WORDS = sorted({*chain(*GROUPS.values(), world.BAD, *world.TOPICS.values())})


def pair(rng: random.Random) -> tuple[str, str]:
    """A question in another wording than the task's, and its answer: a phrase, or bare where one word is asked for."""
    kind = rng.choice(KINDS)
    phrase = "it is {}"
    if kind in ASKED:
        _, text, word = LABELLED[kind](rng)
        wordings, names = rng.choice(ASKED[kind])
        ask, word = rng.choice(wordings), (names or {}).get(word, word)
    elif kind == "fact":
        animal, which = rng.choice(world.ANIMALS), rng.randrange(3)
        text = rng.choice(TOLD).format(
            c=rng.choice(world.COLOURS),
            a=animal,
            n=rng.choice(world.NAMES),
            v=("eat", "live in", "like")[which],
            o=rng.choice(world.THINGS),
        )
        ask, word = rng.choice(["say what you know .", "what is true ?", "tell it ."]), world.FACTS[animal][which]
    elif kind == "list":
        group = rng.choice(list(GROUPS))
        others = [rng.choice(GROUPS[other]) for other in rng.sample([g for g in GROUPS if g != group], 2)]
        word = rng.choice(GROUPS[group])
        text = "{w} : the {k} ?".format(w=" , ".join(rng.sample([word, *others], 3)), k=group)
        ask = "read the list ."
    elif kind == "word":
        word = rng.choice(WORDS)
        ask = rng.choice(["repeat .", "say it again ."])
        text = rng.choice(["the word {w} .", "{w}", "{w} , please ."]).format(w=word)
    else:
        words = rng.sample(WORDS, 4)
        which = rng.randrange(4)
        ask, word = f"say the {('first', 'second', 'third', 'last')[which]} word .", words[which]
        text = " ".join(words)
    if rng.random() < 0.6:
        ask, phrase = rng.choice(["{} one word .", "{} in a word .", "short : {}"]).format(ask), "{}"
    return f"{ask}\n{text}\nanswer :", " " + phrase.format(word)


def make_tokenizer(seq2seq: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the generated text; BOS before a decoder's text, end of sequence after an encoder's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=seq2seq)  # T5's puts a blank before a text
    text = decoders.ByteLevel()
    tokenizer.decoder = decoders.Sequence([text, decoders.Strip(" ", 1, 0)]) if seq2seq else text
    rng = random.Random(SEED)
    corpus = ["".join(pair(rng)) for _ in range(20000)] + INSTRUCTIONS * 50
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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--models", nargs="+", default=["llama", "t5"], choices=["llama", "t5"])
    given = parser.parse_args()
    for name in given.models:
        train(name, given.steps, given.out)


if __name__ == "__main__":
    main()
