"""The Fisher pass against plain forward and backward over the same rows, and the state it leaves at 7B's shapes.

    python benchmarks/fisher.py [--model embedded:llama embedded:t5] [--dtype float32] [--batch 4] [--out FILE.json]

Rows of the embedded benchmark, or with `--tokens` random ones of that many tokens, of which the last four (of a T5
four more) are the answer. `plain` is `model(**batch).loss.backward()` in training mode with a running and a trained
adapter, which makes logits for every token; the ways take turns, and `ratio` is the median over turns of a way's time
divided by plain's. `t5:60m` is a random T5 of t5-small's shape, for where its weights are not at hand. State: what a
merge rule keeps between tasks, measured on one module of 4096 x 4096 after eight tasks of rank 8.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from common import parser, show

TASKS = 8


def state_rows(width: int) -> list[dict[str, Any]]:
    """Bytes kept of one square module, dense and factored; 7B's width is 4096."""
    import torch

    from pm_llm import Merger
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.fisher.base import Fisher
    from pm_llm.fisher.dense import Dense
    from pm_llm.fisher.row_column import Factored

    found = {}
    for form in ("dense", "factored"):
        merger, running = Merger("optimal", max_rank=64), None
        for task in range(TASKS):
            torch.manual_seed(task)
            new = Adapter({"q": LowRank(torch.randn(width, 8), torch.randn(8, width))}, {"target_modules": ["q"]})
            sums = torch.rand(width)
            one: Any = Factored(sums, sums.flip(0)) if form == "factored" else Dense(torch.rand(width, width))
            running = merger.fold(running, new, Fisher({"q": one}))
        found[form] = sum(x.numel() * x.element_size() for x in merger.state_dict().values())
    return [
        {"state of one module": form, "MiB": size / 2**20, "of dense, %": 100 * size / found["dense"]}
        for form, size in found.items()
    ]


def model_and_rows(name: str, given: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A model with a running and a trainable adapter, and its batches."""
    import torch
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.live import RUNNING, TASK, set_active
    from pm_llm.families.base import family
    from pm_llm.families.models import EMBEDDED, load_base
    from pm_llm.sections import LoraSection
    from pm_llm.starts.fresh import Fresh
    from pm_llm.tasks.benchmarks.embedded import make_task
    from pm_llm.tasks.encoding import Encoder

    if name == "t5:60m":
        base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)).to(getattr(torch, given.dtype))
        tokenizer, kind = AutoTokenizer.from_pretrained(EMBEDDED / "t5"), family("encoder_decoder")
    else:
        loaded = load_base(name, given.dtype)
        base, tokenizer, kind = loaded.model, loaded.tokenizer, loaded.family
    model: Any = Fresh().prepare(base, None, LoraSection(r=8), kind)
    Adapter.from_model(model, TASK).attach(model, RUNNING)
    set_active(model, [RUNNING, TASK], trainable=TASK)
    torch.manual_seed(0)
    if given.tokens:
        rows = []
        for _ in range(given.rows):
            ids = torch.randint(5, model.config.vocab_size, (given.tokens,)).tolist()
            row = kind.row(ids, ids[:4]) if name == "t5:60m" else kind.row(ids[:-4], ids[-4:])
            rows.append({**row, "attention_mask": [1] * len(ids)})
    else:
        rows = Encoder(tokenizer, kind, 128, 8).features(make_task("question", given.rows, 1).train)
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    collate, device = DataCollatorForSeq2Seq(tokenizer, model), next(model.parameters()).device
    return model, [collate(rows[i : i + given.batch]).to(device) for i in range(0, len(rows), given.batch)]


def main() -> None:
    """Measure, print two tables, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", nargs="+", default=["embedded:llama", "embedded:t5"])
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--tokens", type=int, default=0)
    arguments.add_argument("--width", type=int, default=4096, help="of the module whose state is measured")
    arguments.add_argument("--turns", type=int, default=5)
    given = arguments.parse_args()
    import torch

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.live import TASK
    from pm_llm.families.base import family_of
    from pm_llm.fisher.measure import sum_fisher

    rows: list[dict[str, Any]] = []
    for name in given.model:
        model, batches = model_and_rows(name, given)
        direction = Adapter.from_model(model, TASK).factors

        def plain(model: Any = model, batches: Any = batches) -> None:
            model.train()
            for batch in batches:
                model(**batch).loss.backward()
            model.zero_grad()

        def fisher(form: str, towards: Any = None, model: Any = model, batches: Any = batches) -> None:
            sum_fisher(model, batches, form, towards)

        def at_answers(model: Any = model, batches: Any = batches) -> None:
            model.train()
            for batch in batches:
                family_of(model).loss(model, batch).backward()
            model.zero_grad()

        ways = {
            "plain": plain,
            "plain, logits at answers only": at_answers,
            "factored": lambda f=fisher: f("factored"),
            "factored and exact": lambda f=fisher, d=direction: f("factored", d),
            "dense": lambda f=fisher: f("dense"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(given.turns + 1):
            for way, run in list(ways.items())[:: -1 if turn % 2 else 1]:
                started = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # the first warms up
                    seconds[way].append(time.perf_counter() - started)
        for way in ways:
            ratios = [a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]
            row = {"model": Path(name).name, "pass": way, "seconds": statistics.median(seconds[way])}
            rows.append({**row, "ratio": round(statistics.median(ratios), 3)})
    show(rows, given.out)
    print()
    show(state_rows(given.width), given.out and given.out.with_suffix(".state.json"))


if __name__ == "__main__":
    main()
