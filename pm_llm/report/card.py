"""The model card of a run's adapter: what it is, how it scored, how to load it; licence and data are left to fill."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pm_llm import __version__
from pm_llm.evaluation.matrix import Matrix
from pm_llm.report.tables import how_scored, numbers, words
from pm_llm.run.record import Results

# the ranks vLLM's --max-lora-rank accepts
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SEQ2SEQ = "SEQ_2_SEQ_LM"


BEGIN, END = (
    "<!-- made by pm_llm; what is between these lines is made anew -->",
    "<!-- end of what is made by pm_llm -->",
)
OURS = ("base_model", "library_name", "model-index", "model_name")  # what of the metadata a run says


def write_card(
    results: Results,
    repo_id: str,
    base_model: str,
    rank: int,
    task_type: str | None,
    path: Path,
    theirs: str | None = None,
    abilities: str = "",
) -> str:
    """Write README.md for the adapter and return its text. Of a card that is there already all stays that a run does
    not say: licence, other metadata, and every text outside of the part that is marked as made here.

    Args:
        results: The run's results.
        repo_id: Where it will be, `user/name`.
        base_model: Hub id (or path) of the base model.
        rank: The adapter's rank.
        task_type: PEFT's task type.
        path: The file to write.
        theirs: The card that is there already.
        abilities: What became of earlier tasks and of the base's abilities, as a table.
    """
    data = _data(results, repo_id, base_model)
    body = _body(results, repo_id, base_model, rank, task_type, abilities)
    if theirs is None:
        text = f"{BEGIN}\n{body}\n{END}\n\n{_LICENCE}"
    else:
        old = ModelCard(theirs, ignore_metadata_errors=True)
        data, text = _with_theirs(data, old.data), _between(old.text, body)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}")
    card.save(path)
    return str(card)


def _with_theirs(ours: ModelCardData, theirs: Any) -> ModelCardData:
    """The user's metadata, with what a run says put in."""
    for key, value in theirs.to_dict().items():
        if key == "tags":
            ours.tags = list(dict.fromkeys([*(value or []), *(ours.tags or [])]))
        elif key not in OURS or ours.get(key) is None:
            setattr(ours, key, value)
    return ours


def _between(text: str, body: str) -> str:
    """A card's text with the part that is made here in its place; behind theirs where it had none."""
    front, found, rest = text.partition(BEGIN)
    if not found:
        return f"{text.strip()}\n\n{BEGIN}\n{body}\n{END}\n"
    return f"{front}{BEGIN}\n{body}\n{END}{rest.partition(END)[2]}"


_LICENCE = """## Licence and data

To be filled in: the licence of this adapter, and where its training data comes from and under what terms.
"""


def plain_type(name: str) -> str:
    """A task's name as the Hub takes it for a dataset's id."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    return found[:96] or "task"


def shown_name(name: str) -> str:
    """A name as text of Markdown: no table is broken, and nothing of it is HTML."""
    return name.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("`", "'")


def _data(results: Results, repo_id: str, base_model: str) -> ModelCardData:
    matrix = Matrix.from_results(results)
    last = len(matrix.stages) - 1
    name = repo_id.rpartition("/")[2]
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=plain_type(task),
            dataset_name=task,
            metric_type=scorer,
            metric_name=f"{scorer} after the last task{how_scored(results)}",
            metric_value=round(matrix.get(last, j), 2),
        )
        for j, (task, scorer) in enumerate(zip(matrix.tasks, results.scorers, strict=True))
        if results.matrix[last][j] is not None  # or its test rows were not kept
    ]
    return ModelCardData(
        base_model=base_model,
        library_name="peft",
        tags=["pm_llm", "lora", "continual-learning", "model-merging"],
        model_name=name,
        eval_results=found,
    )


def _body(
    results: Results, repo_id: str, base_model: str, rank: int, task_type: str | None, abilities: str = ""
) -> str:
    matrix = Matrix.from_results(results)
    method = results.method
    said = ", ".join(f"{key}: {words(method[key])}" for key in ("start", "constrain", "merge"))
    coefficients = ", ".join(
        f"{shown_name(task)} {c:.3f}" for task, c in zip(results.stages, results.coefficients, strict=True)
    )
    shown_numbers = "\n".join(f"- {line}" for line in numbers(results))
    scorers = ", ".join(sorted(set(results.scorers)))
    counts = ", ".join(f"{shown_name(t)} {n}" for t, n in zip(results.tasks, results.test_rows, strict=True))
    kept = f"\n## What was kept\n\n{abilities}\n" if abilities else ""
    auto = "AutoModelForSeq2SeqLM" if task_type == _SEQ2SEQ else "AutoModelForCausalLM"
    rows = ", with rows of earlier tasks" if results.facts.keeps_rows else ", without keeping old data"
    return f"""# {repo_id.rpartition("/")[2]}

One LoRA adapter (rank {rank}) for `{base_model}`, fine-tuned on {len(matrix.stages)} tasks one after the other{rows}:
{", ".join(map(shown_name, matrix.stages))}.

## Method

`{results.preset}` ({said}) of pm_llm {__version__}. Merge coefficients: {coefficients}.

## Results

Scores after each task ({scorers}, rows: the task just trained){how_scored(results)}:

{_table(matrix, results)}

{shown_numbers}

{results.split.capitalize()} rows per task: {counts}.
{kept}
## Use

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base, "{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{base_model}")
```

{_serving(repo_id, base_model, rank, task_type)}"""


def _table(matrix: Matrix, results: Results) -> str:
    names = {name: shown_name(name) for name in [*matrix.tasks, *matrix.stages]}
    tasks, stages = [names[t] for t in matrix.tasks], [names[t] for t in matrix.stages]
    return dataclasses.replace(matrix, tasks=tasks, stages=stages).table(results.coefficients)


def _serving(repo_id: str, base_model: str, rank: int, task_type: str | None) -> str:
    if task_type == _SEQ2SEQ:
        return "vLLM does not serve encoder-decoder models of this kind; use transformers and peft as above."
    fits = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    if not fits:
        return f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}; this one has rank {rank}. Truncate it first."
    name = repo_id.rpartition("/")[2]
    return f"""With vLLM, where it serves this architecture with LoRA:

```bash
vllm serve {base_model} --enable-lora --max-lora-rank {fits[0]} --lora-modules {name}={repo_id}
```"""
