"""Plain SGD, a step on 16 rows or two on 18, alone or by accelerate launch; writes the last loss and the way gone."""

from __future__ import annotations

import sys

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import DPOConfig, SFTConfig, SFTTrainer

from pm_llm import ContinualDPOTrainer, ContinualSeq2SeqTrainer, ContinualSFTTrainer, Perturb
from pm_llm.constraints.anchor import Anchor
from pm_llm.system.processes import shut_down
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, FAMILIES, features, make_peft, tokenizer
from tests.helpers.kinds import of_kind

KINDS_OF_ROWS = ("pairs", "blocks")
ALWAYS = {"epsilon": 0.5, "probability": 0.5}  # never the sign 0
UNEVEN = {"rows": 18, "max_steps": 2, "learning_rate": 0.1}  # two rows left for the second step


def make_trainer(family: str, out: str, batch: int, accumulation: int, constraint=(), plain: bool = False, **options):
    """A Trainer on 16 rows (or `rows`), answers of several lengths, with SGD at rate 1: it moves by the gradient."""
    if family in KINDS_OF_ROWS:
        return make_kind(family, out, batch, accumulation, constraint, **options)
    model = options.pop("model", None) or make_peft(family, random_b=True)
    half = options.pop("rows", 16) // 2
    rows = features(family, half, "question") + features(family, half, "sentiment")
    for i, row in enumerate(rows):  # uneven answers, so that a mean of means would show
        if i % 3 == 0:
            row["labels"] = [*row["labels"][:-1], 5, 6, 7, 1] if family == "t5" else row["labels"]
            if family == "llama":
                row["labels"] = [*row["labels"][:-4], *row["input_ids"][-4:]]
    arguments = arguments_of(out, batch, accumulation, **options)
    if family == "t5":
        args, cls = Seq2SeqTrainingArguments(**arguments), Seq2SeqTrainer if plain else ContinualSeq2SeqTrainer
    else:
        args, cls = SFTConfig(**arguments, max_length=None), SFTTrainer if plain else ContinualSFTTrainer
    extra = {} if plain else {"constraint": constraint}
    return cls(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer(family), model),
        processing_class=tokenizer(family),
        **extra,
    )


def arguments_of(out: str, batch: int, accumulation: int, **options) -> dict:
    return {
        **{"output_dir": out, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        **{"max_steps": 1, "learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "bf16": False},
        **{"max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1},
        **{"gradient_checkpointing": False, "disable_tqdm": True, **options},
    }


def make_kind(kind: str, out: str, batch: int, accumulation: int, constraint, **options):
    """The same on `pairs`, or on `blocks` of two or three rows."""
    model, count, one = make_peft("llama", random_b=True), options.pop("rows", 16), tokenizer("llama")
    options = arguments_of(out, batch, accumulation, **options, max_length=None)
    if kind == "pairs":
        family, cls, args = DECODER.of("preference"), ContinualDPOTrainer, DPOConfig(**options)
        task = of_kind("preference", "topic", train=count)
        rows = [
            {**row, "chosen_ids": [*row["chosen_ids"][:-1], *([5, 6, 7, 1] if i % 3 else [1])]}
            for i, row in enumerate(Encoder(one, family, 96, 8).features(task.train))
        ]
        rows = family.referenced(model, one, rows, 4)
        with torch.no_grad():  # away from the reference, where all pairs are alike
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    else:
        family, cls, args = DECODER, ContinualSFTTrainer, SFTConfig(**options)
        single = features("llama", 2 * count, "question")
        rows = []
        for i in range(count):
            some = single[2 * i : 2 * i + 2 + i % 2]
            lengths = [len(row["input_ids"]) for row in some]
            joined = {key: [x for row in some for x in row[key]] for key in ("input_ids", "labels")}
            rows.append({**joined, "seq_lengths": lengths})
    return cls(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=family.collator(one, model),
        processing_class=one,
        constraint=constraint,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def one_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The last step's loss, and the gradient (the step it made, negated)."""
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    loss = next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log)
    return loss, {name: before[name] - after[name] for name in before}


if __name__ == "__main__":
    out, batch, accumulation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for kind in KINDS_OF_ROWS:
        found = [one_step(make_trainer(kind, out, batch, accumulation, Perturb(**ALWAYS), **x)) for x in ({}, UNEVEN)]
        if PartialState().is_main_process:
            torch.save(found, f"{out}/{kind}.pt")
    for family in FAMILIES:
        trainer = make_trainer(family, out, batch, accumulation, Perturb(**ALWAYS))
        result = one_step(trainer)
        uneven = one_step(make_trainer(family, out, batch, accumulation, Perturb(**ALWAYS), **UNEVEN))
        halves = make_trainer(
            family, f"{out}/{family}", batch, accumulation, **UNEVEN, save_strategy="steps", save_steps=1
        )
        halves.train()
        again = make_trainer(family, f"{out}/{family}", batch, accumulation, **UNEVEN)
        again.train(resume_from_checkpoint=f"{out}/{family}/checkpoint-1")
        resumed = weights(halves.model), weights(again.model)
        anchored = one_step(make_trainer(family, out, batch, accumulation, Anchor(5.0), **UNEVEN))
        if PartialState().is_main_process:
            torch.save((result, uneven, anchored, resumed), f"{out}/{family}.pt")
    del trainer
    shut_down()
