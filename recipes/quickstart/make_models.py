"""Make the embedded models: a tiny LLaMA and a tiny T5, trained on text generated here.

    python recipes/quickstart/make_models.py [--out pm_llm/embedded] [--steps 3000]

The text has the words and the facts of the embedded tasks (which words are kind, which belong together, where people
are), but not their instructions and not their answers' form, so that the tasks are still to be learnt. Seed 0; about
ten minutes on two CPU cores. The files in `pm_llm/embedded` were made by this script with its defaults.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from pm_llm.tasks import embedded as world

SEED, BATCH, LEARNING_RATE = 0, 64, 2e-3
INSTRUCTIONS = sorted({make(random.Random(0))[0] for make in world.MAKERS.values()})


def pair(rng: random.Random) -> tuple[str, str]:
    """A context and how it goes on."""
    kind = rng.choice(["opinion", "page", "where", "list", "fact"])
    if kind == "opinion":
        good = rng.random() < 0.5
        _, text, label = world.sentiment(rng)
        good = label == "positive"
        return text, rng.choice(["i liked it .", "so we were happy ."] if good else ["i hated it .", "so we were sad ."])
    if kind == "page":
        _, text, label = world.topic(rng)
        return text, rng.choice([f"read this on the {label} page .", f"people who love {label} know it ."])
    if kind == "where":
        _, text, label = world.place(rng)
        story, _, name = text.removesuffix(" ?").rpartition(" where is ")
        return f"{story} look for {name} .", f"{name} can be found in the {label} ."
    if kind == "list":
        words = rng.sample(world.WORDS, 3)
        which = rng.randrange(3)
        text = f"{' , '.join(words)} : the {world.POSITIONS[which]} of these"
        return text, f"is {words[which]} ."
    _, text, label = world.follows(rng)
    return text.replace("claim : ", "they say : "), "they are right ." if label == "yes" else "they are wrong ."


def make_tokenizer(seq2seq: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the generated text; BOS before a decoder's text, end of sequence after an encoder's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(SEED)
    labels = "positive negative yes no answer : instruction text question".split()
    corpus = [" ".join(pair(rng)) for _ in range(20000)] + [f" {word}" for word in labels * 50] + INSTRUCTIONS * 50
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
    """A batch of language modelling (decoder) or of context to continuation (encoder-decoder)."""
    pairs = [pair(rng) for _ in range(BATCH)]
    if seq2seq:
        # two contexts at a time would be too easy to tell apart; half of the inputs carry an idle instruction
        texts = [f"{rng.choice(INSTRUCTIONS)}\n{a}" if rng.random() < 0.3 else a for a, _ in pairs]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokenizer([b for _, b in pairs], padding=True, return_tensors="pt")["input_ids"]
    else:
        texts = [f"{rng.choice(INSTRUCTIONS)}\n{a} {b}" if rng.random() < 0.3 else f"{a} {b}" for a, b in pairs]
        inputs = tokenizer([text + "</s>" for text in texts], padding=True, return_tensors="pt")
        labels = inputs["input_ids"]
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


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
        loss = model(**batch(tokenizer, seq2seq, rng)).loss
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
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--models", nargs="+", default=["llama", "t5"], choices=["llama", "t5"])
    given = parser.parse_args()
    for name in given.models:
        train(name, given.steps, given.out)


if __name__ == "__main__":
    main()
