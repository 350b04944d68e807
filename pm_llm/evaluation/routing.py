"""Routing in place of merging: all task adapters are kept, and each prompt, or token, goes to those it looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, PeftModel
from torch import Tensor

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers
from pm_llm.config import RunConfig, build
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.predictions import Predictions
from pm_llm.families.models import Base, load_base
from pm_llm.run.folder import RunDir
from pm_llm.run.reading import TASK_ADAPTER
from pm_llm.system.progress import bar
from pm_llm.tasks.base import Example, Task, distinct
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks

ROUTERS = ("nearest", "arrow")
ROUTER = "arrow_router"  # by this name PEFT knows which adapter is none of those that are mixed


@dataclass(frozen=True)
class Routed:
    """The predictions of each task, which adapter each of its rows was `sent` to (0: the first task's), the share of
    them that was `right`, and what is kept, in bytes. Arrow sends tokens, not rows: both lists are empty."""

    predictions: list[Predictions]
    sent: list[list[int]]
    right: list[float]
    kept_bytes: int


def route(path: str, router: str = "nearest", prototypes: int = 64) -> Routed:
    """Score a run's task adapters without a task id.

    `nearest`: each prompt is answered with the adapter of the nearest prototype. A task's prototype is the mean of the
    base model's last hidden states, averaged over the tokens of each of its training prompts; nearest is by Euclidean
    distance. `arrow`: PEFT's Arrow (arXiv 2405.11157), in which every adapted module mixes, token by token, the
    updates of the at most three adapters whose leading right singular direction the token's state lies along; nothing
    but the adapters is kept. (X-LoRA, PEFT's other router, has to be trained on rows of all tasks, and old rows are
    gone.)

    Args:
        path: The folder of a finished run whose adapters each stand on the base model alone (`start: alone`).
        router: `nearest` or `arrow`.
        prototypes: How many training prompts a prototype is the mean of, at most.

    Raises:
        PmLlmError: If there is no such router, the run is not finished, or its adapters build on each other.
    """
    if router not in ROUTERS:
        raise PmLlmError(f"router is {router!r}; it must be {' or '.join(ROUTERS)}.")
    run_dir = RunDir.open(path)
    results = run_dir.results()
    config: RunConfig = build(RunConfig, {**results.config, "output_dir": path}, "").check()
    if config.parsed_method().start.name != "alone":
        raise PmLlmError(f"{path}: its adapters build on each other. Route a run with start alone, such as per_task.")
    tasks = distinct(load_tasks(config))
    encoders, fitting = encoders_for(config, tasks.values())
    tasks = {name: fitting(task) for name, task in tasks.items()}
    base = load_base(config.model, config.dtype, config.load_in_4bit, config.attn_implementation)
    folders = {name: run_dir.stage_adapter(i, TASK_ADAPTER) for i, name in enumerate(results.stages)}
    run_dir.check([f"{folder.relative_to(run_dir.path).as_posix()}/" for folder in folders.values()])
    size = sum(file.stat().st_size for folder in folders.values() for file in folder.rglob("*"))
    if router == "arrow":
        model = arrow(base, list(folders.values()))
        said = [answer_task(model, encoders[name], task, config.evaluation) for name, task in tasks.items()]
        return Routed(said, [], [], size)
    return _nearest_adapter(base, config, tasks, encoders, folders, size, prototypes)


def arrow(base: Base, folders: Sequence[Path]) -> PeftModel:
    """The base model with all adapters in `folders` and Arrow among them. Modules are named in full, which PEFT's own
    `create_arrow_model` does not do: it fails on adapters of some layers only."""
    names = [f"task_{i}" for i in range(len(folders))]
    ranks = {x.rank for folder in folders for x in Adapter.load(folder).factors.values()}
    if len(ranks) > 1:
        raise PmLlmError(f"Arrow needs adapters of one rank, these have {sorted(ranks)}. Use the router nearest.")
    model = PeftModel.from_pretrained(base.model, str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    settings = ArrowConfig(top_k=min(3, len(names)), rng_seed=0)
    settings.task_adapter_names, settings.gks_adapter_names = names, []
    modules = list(lora_layers(model))
    model.add_adapter(ROUTER, LoraConfig(r=ranks.pop(), target_modules=modules, arrow_config=settings))
    model.set_adapter(ROUTER)
    return model


def _nearest_adapter(
    base: Base,
    config: RunConfig,
    tasks: Mapping[str, Task],
    encoders: Mapping[str, Encoder],
    folders: Mapping[str, Path],
    size: int,
    prototypes: int,
) -> Routed:
    centres = torch.stack(
        [_states(base, encoders[name], task.train[:prototypes]).mean(0) for name, task in tasks.items()]
    )
    chosen = {name: _nearest(_states(base, encoders[name], task.test), centres) for name, task in tasks.items()}
    answers: dict[str, dict[int, Any]] = {name: {} for name in tasks}
    found: dict[str, Predictions] = {}
    model: Any = None
    for number, adapter in enumerate(tasks):
        folder = str(folders[adapter])
        if model is None:
            model = PeftModel.from_pretrained(base.model, folder, adapter_name=str(number))
        else:
            model.load_adapter(folder, adapter_name=str(number))
        model.set_adapter(str(number))
        for name, task in tasks.items():
            rows = [i for i, place in enumerate(chosen[name]) if place == number]
            if rows:
                part = replace(task, test=[task.test[i] for i in rows])
                said = answer_task(model, encoders[name], part, config.evaluation)
                answers[name] |= dict(zip(rows, _rows(said), strict=True))
                found[name] = said
    joined = [_joined(found[name], [answers[name][i] for i in range(len(task.test))]) for name, task in tasks.items()]
    right = [sum(p == k for p in chosen[name]) / len(chosen[name]) for k, name in enumerate(tasks)]
    return Routed(joined, list(chosen.values()), right, size + centres.numel() * centres.element_size())


def _states(base: Base, encoder: Encoder, examples: Sequence[Example], size: int = 16) -> Tensor:
    """The mean last hidden state of each prompt, (prompts, width), of unit length."""
    model: Any = base.model
    backbone = base.family.prompt_reader(model)
    prompts = [encoder.prompt(example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Any] = [None] * len(prompts)
    with torch.no_grad(), bar(len(prompts), "prototypes", "row") as progress:
        for at in range(0, len(order), size):
            places = order[at : at + size]
            batch = base.tokenizer.pad({"input_ids": [prompts[i] for i in places]}, return_tensors="pt").to(
                model.device
            )
            states = backbone(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
            for i, mean in zip(places, means, strict=True):
                found[i] = mean
            progress.update(len(places))
    return torch.stack(found)


def _nearest(states: Tensor, centres: Tensor) -> list[int]:
    return torch.cdist(states, centres).argmin(dim=1).tolist()


def _rows(said: Predictions) -> list[tuple[Any, ...]]:
    columns = (said.predictions, said.references, said.sources, said.keys, said.prompts, said.places)
    return list(zip(*columns, strict=True))


def _joined(like: Predictions, rows: Sequence[tuple[Any, ...]]) -> Predictions:
    return Predictions(like.task, like.scorer, *(list(column) for column in zip(*rows, strict=True)))
