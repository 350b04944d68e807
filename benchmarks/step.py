"""Time and memory of a training step: perturbed against plain, and with a running adapter against without.

    python benchmarks/step.py [--model embedded:llama] [--dtype float32] [--batch 4] [--tokens 128] [--out FILE.json]

One Trainer, one model, one batch; the ways take turns step by step, so that noise meets all alike. A row's `ratio` is
the median over turns of its time divided by the time of the plain step of the same turn. `folded`: the running
adapter in the base weights; `two adapters`: beside the trained one, as for quantised bases. `logits error` is the mean
absolute difference from float32 weights with two adapters, divided by the mean absolute logit.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import nullcontext
from typing import Any

from common import parser, show

RUNNING_RANK, RANK = 64, 8


def past_of_tasks(running: Any) -> Any:
    """A merge rule that remembers as many tasks as fill its bounds, with random factored Fishers."""
    import torch

    from pm_llm import Merger
    from pm_llm.fisher.base import Fisher
    from pm_llm.fisher.row_column import Factored

    merger, merged = Merger("optimal", max_rank=RUNNING_RANK), None
    for _ in range(4):
        fisher = {n: Factored(torch.rand(x.shape[0]), torch.rand(x.shape[1])) for n, x in running.factors.items()}
        merged = merger.fold(merged, running, Fisher(fisher))
    return merger.rule


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="embedded:llama", help="a decoder: hub id, folder or embedded:llama")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--load-in-4bit", action="store_true")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--turns", type=int, default=15)
    given = arguments.parse_args()
    import torch
    from datasets import Dataset
    from trl import SFTConfig

    from pm_llm import ContinualSFTTrainer, Perturb
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.in_base import folded, why_not
    from pm_llm.adapters.live import RUNNING, TASK, set_active
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.constraints.base import Context
    from pm_llm.constraints.curvature import Curvature
    from pm_llm.families.models import load_base
    from pm_llm.sections import LoraSection
    from pm_llm.starts.fresh import Fresh
    from pm_llm.system.processes import Clock

    base = load_base(given.model, given.dtype, given.load_in_4bit)
    model: Any = Fresh().prepare(base.model, None, LoraSection(r=RANK), base.family)
    task = Adapter.from_model(model, TASK)
    torch.manual_seed(0)
    running = task.replace_factors(
        {
            name: LowRank(torch.randn(x.shape[0], RUNNING_RANK) / 50, torch.randn(RUNNING_RANK, x.shape[1]) / 50)
            for name, x in task.factors.items()
        }
    )
    running.attach(model, RUNNING)
    device = next(model.parameters()).device
    ids = torch.randint(5, len(base.tokenizer), (given.batch, given.tokens), device=device)
    labels = ids.clone()
    labels[:, : given.tokens - 4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def logits_error() -> dict[str, float]:
        """Of the folded and the two-adapter model in this type, against float32."""
        if given.load_in_4bit:
            return {}
        exact: Any = Fresh().prepare(load_base(given.model).model, running, LoraSection(r=RANK), base.family)
        task.attach(exact, TASK)
        set_active(exact, [RUNNING, TASK], trainable=TASK)
        found = {}
        with torch.no_grad():
            expected = exact(input_ids=ids).logits
            set_active(model, [RUNNING, TASK], trainable=TASK)
            for name, block in (("two adapters", nullcontext()), ("folded", folded(model, "always"))):
                with block, torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bfloat16"):
                    logits = model(input_ids=ids).logits.float()
                found[name] = float((logits - expected).abs().mean() / expected.abs().mean())
        return found

    errors = logits_error()
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": device.type == "cpu", "bf16": given.dtype == "bfloat16", "report_to": "none"}
        set_active(model, [TASK], trainable=TASK)
        trainer = ContinualSFTTrainer(
            model,
            args=SFTConfig(folder, max_steps=1, max_length=None, disable_tqdm=True, **options),
            train_dataset=Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}]),
            processing_class=base.tokenizer,
        )
        trainer.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    items = torch.tensor(4 * given.batch, device=device)
    perturb = [Perturb()]

    def step(constraints: list[Any], turn: int) -> tuple[float, int]:
        trainer.constraints, trainer.state.global_step = constraints, turn
        trainer.state.max_steps = 10**9
        clock = Clock(device)
        trainer.training_step(model, dict(batch), items)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.stop("step")
        return clock.seconds["step"], clock.peak_memory["step"]

    penalty = Curvature()
    penalty.prepare(Context(2, running.factors, past_of_tasks(running)))
    ways = {"plain": (perturb[:0], "alone"), "perturbed": (perturb, "alone")}
    ways |= {"perturbed, curvature penalty": ([*perturb, penalty], "alone")}
    ways |= {"plain, running as two adapters": (perturb[:0], "two adapters")}
    if why_not(model) is None:
        ways["plain, running folded"] = (perturb[:0], "folded")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, list[int]] = {way: [] for way in ways}
    for turn in range(given.turns + 1):
        for way in [*ways, *list(ways)[::-1]]:  # there and back: no way is always first
            constraints, how = ways[way]
            set_active(model, [TASK] if how == "alone" else [RUNNING, TASK], trainable=TASK)
            with folded(model, "always") if how == "folded" else nullcontext():
                took, peak = step(constraints, turn)
            if turn:  # the first warms up
                seconds[way].append(took)
                peaks[way].append(peak)
    rows = []
    for way in ways:
        ratios = [a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]
        rows.append(
            {
                "step": way,
                "ms": 1000 * statistics.median(seconds[way]),
                "ratio": round(statistics.median(ratios), 3),
                "peak memory, MiB": round(statistics.median(peaks[way]) / 2**20),
                "logits error": next((f"{e:.1e}" for how, e in errors.items() if how in way), "-"),
            }
        )
    show(rows, given.out)


if __name__ == "__main__":
    main()
