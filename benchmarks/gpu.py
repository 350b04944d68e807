"""All that only an accelerator can show, in one call: steps, memory, throughput, full-depth orders, FSDP2.

    python benchmarks/gpu.py --out FOLDER [--model DIR] [--data-dir CL_BENCHMARK] [--device cpu --tiny] [--parts steps]
    python benchmarks/gpu.py --table FOLDER

`--model` is a small real model (SmolLM2, say); beside it a LLaMA of 7B shape with random weights is written and
measured. Every measurement is a process of its own and leaves a JSON file; what failed leaves what it said, and the
others go on; what is there already is not measured again. Steps and throughput are medians; memory is the device's
peak, on a CPU the process's. `--tiny` puts the embedded model and a small shape in place, for a rehearsal on any
machine: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import plain

WAYS = ("plain TRL", "perturb", "curvature", "anchor", "QLoRA")
PASSES = ("Fisher, Kronecker", "merge", "generation")
METHODS = ("seqlora", "pm", "pm_curvature", "joint")
SHAPES = {  # hidden, intermediate, layers, heads
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
}
PARTS = ("steps", "passes", "orders", "fsdp2")
ROOT = Path(__file__).parents[1]


def write_model(folder: Path, shape: str) -> None:
    """A LLaMA with random weights in bfloat16 and the embedded one's tokenizer, as a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from pm_llm.families.models import EMBEDDED
    from pm_llm.system.processes import process_state

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "llama")
    size = 32_000 if shape == "7b" else len(tokenizer)
    with torch.device(process_state().device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=size, **SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepared(model: str, way: str, tokens: int, batch: int) -> tuple[Any, Any, dict[str, Any], list[Any]]:
    """A model with a task adapter, its base, a batch, and the constraints of a way."""
    import torch

    from pm_llm import Merger, Perturb
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.live import TASK, set_active
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.constraints.anchor import Anchor
    from pm_llm.constraints.base import Context
    from pm_llm.constraints.curvature import Curvature
    from pm_llm.families.models import load_base
    from pm_llm.fisher import moments
    from pm_llm.fisher.base import Fisher
    from pm_llm.fisher.kronecker import Kronecker
    from pm_llm.sections import LoraSection
    from pm_llm.starts.fresh import Fresh

    base = load_base(model, "bfloat16", way == "QLoRA")
    live: Any = Fresh().prepare(base.model, None, LoraSection(r=8, target_modules="all-linear"), base.family)
    set_active(live, [TASK], trainable=TASK)
    device = next(live.parameters()).device
    ids = torch.randint(5, len(base.tokenizer), (batch, tokens), device=device)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    constraints: list[Any] = {"perturb": [Perturb()], "anchor": [Anchor()]}.get(way, [])
    if way == "curvature":
        merger, merged, one = Merger("optimal"), None, Adapter.from_model(live, TASK)
        for _ in range(4):
            new = one.replace_factors(
                {n: LowRank(torch.randn(x.B.shape), torch.randn(x.A.shape)) for n, x in one.factors.items()}
            )
            fishers = {}
            for name, (d_out, d_in) in ((n, x.shape) for n, x in one.factors.items()):
                sides = [moments.blank(d, torch.device("cpu")) for d in (d_out, d_in)]
                for side, d in zip(sides, (d_out, d_in), strict=True):
                    moments.add(side, torch.randn(1, 16, d), torch.eye(16)[None])
                fishers[name] = Kronecker(*sides)
            merged = merger.fold(merged, new, Fisher(fishers))
        penalty = Curvature()
        penalty.prepare(Context(5, merged.factors, merger.rule))
        constraints = [penalty]
    batch_of = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return live, base, batch_of, constraints


def measure_step(model: str, way: str, given: Any) -> dict[str, Any]:
    """The median time of a training step, and the peak of memory."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pm_llm import ContinualSFTTrainer
    from pm_llm.system.processes import Clock

    live, base, batch, constraints = prepared(model, way, given.tokens, given.batch)
    device = batch["input_ids"].device
    options = {"use_cpu": device.type == "cpu", "bf16": True, "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "args": SFTConfig(folder, max_steps=1, max_length=None, **options),
            "train_dataset": Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}]),
            "processing_class": base.tokenizer,
        }
        trainer: Any = (
            SFTTrainer(live, **settings)
            if way in ("plain TRL", "QLoRA")
            else ContinualSFTTrainer(live, constraint=constraints, **settings)
        )
        trainer.train()
    trainer.state.max_steps = 10**9
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-4)
    items, clock, took = (batch["labels"] != -100).sum(), Clock(device), []
    for turn in range(given.turns + 2):
        trainer.state.global_step = turn
        trainer.training_step(live, dict(batch), items)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        clock.stop(str(turn))
        took.append(clock.seconds[str(turn)])
    return {"ms": 1000 * statistics.median(took[2:]), "peak, GiB": clock.peak_memory[str(turn)] / 2**30}


def measure_pass(model: str, what: str, given: Any) -> dict[str, Any]:
    """A Fisher's rows a second, a merge's seconds, or generated tokens a second."""
    import torch

    from pm_llm import Merger
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.live import TASK
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.fisher.measure import sum_fisher

    live, _, batch, _ = prepared(model, "plain TRL", given.tokens, given.batch)
    device, took, found = batch["input_ids"].device, [], {}
    one = Adapter.from_model(live, TASK)
    one = one.replace_factors({n: LowRank(torch.randn(x.B.shape), x.A) for n, x in one.factors.items()})
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        if what == "generation":
            with torch.no_grad():
                live.eval().generate(
                    input_ids=batch["input_ids"], max_new_tokens=32, min_new_tokens=32, do_sample=False
                )
            found = {"tokens a second": 32 * given.batch}
        else:
            fisher = sum_fisher(live, [batch], "kronecker").mean()
            synchronize(device)
            if what == "merge":
                merger, started = Merger("optimal"), time.perf_counter()
                merger.fold(merger.fold(None, one, fisher), one, fisher)
                found = {"merges a second": 2}
            else:
                found = {"rows a second": given.batch}
        synchronize(device)
        took.append(time.perf_counter() - started)
    return {key: n / statistics.median(took) for key, n in found.items()}


def synchronize(device: Any) -> None:
    """Wait for a device."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def commands(given: Any, scratch: Path) -> dict[str, list[str]]:
    """What is measured, by the name of its file: the words of a process each."""
    own = [sys.executable, __file__, *(["--tiny"] if given.tiny else []), "--device", given.device]
    own += ["--tokens", str(given.tokens), "--batch", str(given.batch), "--turns", str(given.turns)]
    models = {"small": given.model or "embedded:llama", "7b": str(scratch / "7b")}
    found = {}
    for part, names in (("steps", WAYS), ("passes", PASSES)):
        for label, model in models.items():
            for name in names:
                found[f"{part}-{label}-{name}"] = [*own, "--measure", part, name, "--model", model]
    tasks = ["--benchmark", "embedded", "--max_test_samples", "4", "--train.max_steps", "2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(scratch / "fsdp2.yaml")]
    launch += ["--main_process_port", "0", str(ROOT / "recipes/continual.py"), "--model", models["7b"]]
    found["fsdp2"] = [*launch, *tasks, "--method", "pm_curvature", "--output_dir", str(scratch / "fsdp2")]
    found["fsdp2"] += ["--order", "sentiment,topic", "--fisher.samples", "4", "--dtype", "bfloat16"]
    orders = [
        sys.executable,
        str(ROOT / "benchmarks/methods.py"),
        "--out",
        str(given.out / ("orders-tiny" if given.tiny else "orders")),
    ]
    orders += ["--seeds", "0"] if given.tiny else ["--seeds", "0", "1", "2"]
    methods = METHODS[:2] if given.tiny else METHODS
    if given.model and given.data_dir:
        orders += ["--model", given.model, "--data-dir", given.data_dir, "--orders", "order1", "order2", "order3"]
        found["orders"] = [*orders, "--methods", *methods, "--lora.layers_to_transform", "none"]
    elif given.tiny:
        found["orders"] = [*orders, "--methods", *methods, "--train.max_steps", "2", "--max_test_samples", "2"]
    return {name: words for name, words in found.items() if name.partition("-")[0] in given.parts}


def run_all(given: Any) -> int:
    """Every measurement that is not there yet; returns how many failed."""
    import yaml

    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    env = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if given.device == "cpu" else {})}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        launcher = yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text())
        launcher |= {"num_processes": 2, "use_cpu": given.device == "cpu"}
        (scratch / "fsdp2.yaml").write_text(yaml.safe_dump(launcher))
        write = [sys.executable, __file__, "--measure", "model", str(scratch / "7b"), "--device", given.device]
        if {"steps", "passes", "fsdp2"} & set(given.parts):  # without it those say so
            subprocess.run([*write, *(["--tiny"] if given.tiny else [])], env=env)
        for name, words in commands(given, scratch).items():
            file = given.out / f"{name.replace(' ', '_').replace(',', '')}.json"
            how = {"what": name, "device": given.device, "model": str(given.model), "tiny": given.tiny}
            how |= {"tokens": given.tokens, "batch": given.batch}
            before = json.loads(file.read_text()) if file.exists() else {}
            if "error" not in before and how.items() <= before.items():
                continue
            started = time.perf_counter()
            done = subprocess.run(words, env=env, capture_output=True, text=True)
            found = {**how, "seconds": round(time.perf_counter() - started, 1)}
            if done.returncode:
                failed += 1
                found["error"] = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            elif words[1] == __file__:
                found |= json.loads(done.stdout.splitlines()[-1])
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found.get('error', found)}", flush=True)
    return failed


def table(folder: Path) -> str:
    """The measurements of a folder as Markdown, errors by their last line."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        kind, _, rest = found["what"].partition("-")
        number = {k: v for k, v in found.items() if "," in k or " " in k or k == "ms"}
        said = ", ".join(f"{key} {value:.4g}" for key, value in number.items()) or f"{found['seconds']} s"
        failed = found.get("error", "").strip().splitlines()[-1:]
        rows.append({"part": kind, "of": rest or "-", "device": found["device"], "found": (failed or [said])[0]})
    return plain(rows)


def main() -> None:
    """Measure all, or one thing, or print a folder's table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path)
    made.add_argument("--table", type=Path, metavar="FOLDER")
    made.add_argument("--model", help="a small real model; none: the embedded one")
    made.add_argument("--data-dir", help="O-LoRA's CL_Benchmark, for the standard orders; none: they are left out")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--tokens", type=int)
    made.add_argument("--batch", type=int)
    made.add_argument("--turns", type=int)
    made.add_argument("--measure", nargs=2, metavar=("PART", "NAME"), help=argparse.SUPPRESS)
    given = made.parse_args()
    given.tokens, given.batch = given.tokens or (16 if given.tiny else 512), given.batch or (2 if given.tiny else 4)
    given.turns = given.turns or (1 if given.tiny else 10)
    if given.table:
        print(table(given.table))
    elif given.measure:
        part, name = given.measure
        if part == "model":
            write_model(Path(name), "tiny" if given.tiny else "7b")
        else:
            print(json.dumps({"steps": measure_step, "passes": measure_pass}[part](given.model, name, given)))
    elif given.out is None:
        made.error("give --out FOLDER, or --table FOLDER")
    else:
        failed = run_all(given)
        print(table(given.out))
        sys.exit(1 if failed and given.tiny else 0)  # on an accelerator what it cannot do is a finding


if __name__ == "__main__":
    main()
