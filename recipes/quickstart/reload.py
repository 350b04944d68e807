"""Load an adapter with transformers and peft alone and compare its greedy answers with those of the run.

python reload.py BASE ADAPTER PROMPTS.jsonl PREDICTIONS.jsonl ...
"""

import json
import sys
from itertools import groupby

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer


def main(base: str, adapter: str, prompts_file: str, *predictions_files: str) -> None:
    """Exit with 1 if any answer differs."""
    with open(prompts_file) as file:
        rows = [json.loads(line) for line in file]
    expected = []
    for predictions_file in predictions_files:
        with open(predictions_file) as file:
            expected += [json.loads(line)["prediction"] for line in file]
    seq2seq = AutoConfig.from_pretrained(base).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right" if seq2seq else "left")
    answers = []
    for limit, group in groupby(rows, key=lambda row: row["max_new_tokens"]):
        prompts = [row["prompt"] for row in group]
        batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=limit, do_sample=False)
        output = output if seq2seq else output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    assert not any(name.split(".")[0] == "pm_llm" for name in sys.modules)
    different = [pair for pair in zip(answers, expected, strict=True) if pair[0] != pair[1]]
    if different:
        sys.exit(f"{len(different)} of {len(answers)} answers differ, e.g. {different[0]}")
    print(f"reloaded in a fresh process with transformers and peft alone: {len(answers)} identical answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
