"""A run's result as other programs want it: a PEFT adapter, a whole model, a GGUF file. Each is loaded again and
compared."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from pm_llm.adapters.adapter import Adapter, check_dtype
from pm_llm.adapters.gguf_file import read_gguf, write_gguf
from pm_llm.algebra import lowrank
from pm_llm.config import RunConfig, configured
from pm_llm.errors import PmLlmError
from pm_llm.families.base import Batch, family_for
from pm_llm.families.models import resolve
from pm_llm.report.gate import refuse_failed
from pm_llm.run.folder import RunDir
from pm_llm.run.kept import read_all
from pm_llm.system.files import new_folder
from pm_llm.tasks.base import Task
from pm_llm.tasks.fitting import encoders_for

KINDS = ("adapter", "model", "gguf")
PROMPTS = 8  # of the run's test rows, on which an export is compared
SHARD = "5GB"  # of a model's files


def export(run: str | Path, kind: str, out: str | Path, dtype: str | None = None, base: str | None = None) -> str:
    """Write a run's result, load it again and compare; returns what was written and how near it is, in words.

    Args:
        run: The run's folder.
        kind: `adapter`, `model` or `gguf`.
        out: The folder to write; must not exist.
        dtype: Of the weights: float32, bfloat16 or float16; by default the adapter's, or for a model the run's.
        base: The base model's id that the adapter is to name, where the run's is a folder.

    Raises:
        PmLlmError: If the run has no one adapter, the kind cannot be made, or what is read again is not what was
            written. Then `out` is not there.
    """
    if kind not in KINDS:
        raise PmLlmError(f"--as is {kind!r}; it must be {', '.join(KINDS)}.")
    check_dtype(dtype)
    run_dir = RunDir.open(run)
    state = run_dir.state()
    config = configured(state["config"], None, str(run_dir.path))
    adapter = Adapter.load(run_dir.adapter)
    if state["stages"][-1].facts.knows_task and len(state["stages"]) > 1:
        raise PmLlmError(f"{run_dir.path} has an adapter for each task, and none for all of them. Export one by hand.")
    refuse_failed(run_dir)
    tasks = read_all(run_dir, state["stages"])
    with new_folder(out) as scratch:
        if kind == "gguf":
            said = _as_gguf(adapter, config, scratch, dtype or "float32")
        elif kind == "adapter":
            said = _as_adapter(adapter, config, scratch, dtype, base, tasks, run_dir.adapter)
        else:
            said = _as_model(adapter, config, scratch, dtype or config.dtype, tasks, run_dir.adapter)
    return f"{out}: {said}"


def _as_gguf(adapter: Adapter, config: RunConfig, out: Path, dtype: str) -> str:
    base = AutoConfig.from_pretrained(resolve(config.model), trust_remote_code=False)
    file = out / "adapter.gguf"
    write_gguf(adapter, base, file, dtype)
    again, lost, whole = read_gguf(file, adapter, base), 0.0, 0.0
    for name, x in adapter.factors.items():
        gap = lowrank.add(again.factors[name], x.scale(-1.0))
        lost, whole = lost + max(0.0, lowrank.inner(gap, gap)), whole + lowrank.inner(x, x)
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    _check(error, dtype)
    return f"adapter.gguf, rank {adapter.rank} in {dtype}; read again by llama.cpp's rule it is {error:.1e} off"


def _as_adapter(
    adapter: Adapter,
    config: RunConfig,
    out: Path,
    dtype: str | None,
    base: str | None,
    tasks: list[Task],
    own: Path,
) -> str:
    adapter.save(out, dtype)
    if base is not None:
        place = out / "adapter_config.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "base_model_name_or_path": base}, indent=2))
    batch = _prompts(config, tasks)
    model = PeftModel.from_pretrained(_base(config), own)
    before = _logits(model, batch)
    model.load_adapter(out, "again")
    model.set_adapter("again")
    after = _logits(model, batch)
    error = _gap(before, after)
    _check(error, dtype or "float32")
    return f"rank {adapter.rank}; on {len(before)} tokens of prompts its logits are {error:.1e} off (relative)"


def _as_model(adapter: Adapter, config: RunConfig, out: Path, dtype: str, tasks: list[Task], own: Path) -> str:
    """The base's weights with `B A` added in float32 and rounded once; tokenizer, template and generation settings as
    they came."""
    name, batch = resolve(config.model), _prompts(config, tasks)
    before = _logits(PeftModel.from_pretrained(_base(config), own), batch)
    model = _base(config, dtype)
    add_to_weights(model, adapter)
    model.save_pretrained(out, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(out)
    with suppress(OSError):  # a base need not have any
        GenerationConfig.from_pretrained(name).save_pretrained(out)
    auto = family_for(model.config).auto_class()
    after = _logits(auto.from_pretrained(out, dtype=getattr(torch, dtype), trust_remote_code=False), batch)
    error = _gap(before, after)
    _check(error, dtype)
    bits = " (the base in full precision, not in the 4 bits it was trained in)" if config.load_in_4bit else ""
    return f"a model in {dtype}{bits}; on {len(before)} tokens of prompts its logits are {error:.1e} off (relative)"


@torch.no_grad()
def add_to_weights(model: Any, adapter: Adapter) -> None:
    """Add `B A` to a base model's weights, in float32, rounded once. Raises PmLlmError where layers share weights."""
    modules, used = dict(model.named_modules()), [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    for name, x in adapter.factors.items():
        weight = modules[name].weight
        if used.count(id(weight)) > 1:
            raise PmLlmError(f"{name} shares its weights with another layer, so nothing can be added to it alone.")
        change = x.dense().T if isinstance(modules[name], Conv1D) else x.dense()
        weight.copy_((weight.float() + change).to(weight.dtype))


def _base(config: RunConfig, dtype: str = "float32") -> Any:
    """The base model, plain and on the CPU."""
    name = resolve(config.model)
    auto = family_for(AutoConfig.from_pretrained(name, trust_remote_code=False)).auto_class()
    return auto.from_pretrained(name, dtype=getattr(torch, dtype), trust_remote_code=False)


def _prompts(config: RunConfig, tasks: list[Task]) -> list[Batch]:
    """Some of the run's test rows, encoded; where it keeps none, a sentence."""
    from pm_llm.families.models import load_tokenizer

    tokenizer, family = load_tokenizer(config.model)
    encoders, _ = encoders_for(config, tasks)
    rows = [(encoders[t.name], t.test[i]) for i in range(PROMPTS) for t in tasks if i < len(t.test)][:PROMPTS]
    found = [encoder.features([row])[0] for encoder, row in rows]
    if not found:
        ids = tokenizer("What is read again says the same.")["input_ids"]
        found = [family.row(ids, ids)]
    return [{key: torch.tensor([x]) for key, x in row.items()} for row in found]


@torch.no_grad()
def _logits(model: Any, batches: list[Batch]) -> torch.Tensor:
    """(tokens, vocabulary), over all rows."""
    model.eval()
    return torch.cat([model(**batch).logits[0].float() for batch in batches])


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def _check(error: float, dtype: str) -> None:
    """Raise PmLlmError if it is more than rounding."""
    most = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    if not error <= most:
        raise PmLlmError(
            f"what was written is {error:.1e} off when it is read again, more than {dtype} rounds. Nothing was kept; "
            "please report it."
        )
