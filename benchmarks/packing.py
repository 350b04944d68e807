"""Tokens a second on uneven rows: padded, grouped by length, packed; against plain TRL with the same settings.

    python benchmarks/packing.py [--model embedded:llama] [--rows 96] [--longest 256] [--turns 3] [--out FILE.json]

Half of a row's tokens are its answer. The ways take turns, one pass over all rows each; a row's `tokens/s` is the
median over turns, of tokens that are no padding, `to TRL` the median of its ratio to TRL's way in the same turn, and
`to padded` that to the padded rows of the same library.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from common import parser, show

WAYS = ("padded", "grouped", "packed")


def uneven(count: int, longest: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows whose lengths are log-normal, as those of chats are."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(longest / 6), 0.8, count)).astype(int), 8, longest)
    rows = []
    for n in lengths:
        ids = rng.integers(5, vocabulary, n).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="embedded:llama", help="a decoder: hub id, folder or embedded:llama")
    arguments.add_argument("--rows", type=int, default=96)
    arguments.add_argument("--longest", type=int, default=256)
    arguments.add_argument("--turns", type=int, default=3)
    given = arguments.parse_args()
    import torch
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from pm_llm import ContinualSFTTrainer
    from pm_llm.families.models import add_task_adapter, load_base
    from pm_llm.families.packing import Packing, packed
    from pm_llm.sections import LoraSection
    from pm_llm.training.patches import original_forward

    disable_progress_bars()
    base = load_base(given.model)
    model = add_task_adapter(base.model, LoraSection(target_modules="all-linear"), base.family, "default")
    rows = Dataset.from_list(uneven(given.rows, given.longest, model.get_input_embeddings().num_embeddings))
    tokens = sum(map(len, rows["input_ids"]))

    def seconds(library: str, way: str, out: str) -> float:
        settings: dict[str, Any] = {"max_length": given.longest if way == "packed" else None}
        if way == "grouped":
            settings["train_sampling_strategy"] = "group_by_length"
        if library == "TRL" and way == "packed":
            settings |= {"packing": True, "padding_free": False}
        data, collate = rows, None
        if library == "pm_llm":
            settings["max_length"], collate = None, Packing(base.tokenizer, model)
            data = packed(rows, given.longest) if way == "packed" else rows
        args = SFTConfig(
            output_dir=out,
            num_train_epochs=1,
            per_device_train_batch_size=2 if way == "packed" else 8,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            gradient_checkpointing=False,
            **settings,
        )
        with original_forward(model):
            trainer = (SFTTrainer if library == "TRL" else ContinualSFTTrainer)(
                model, args=args, train_dataset=data, data_collator=collate, processing_class=base.tokenizer
            )
            begun = time.perf_counter()
            trainer.train()
            return time.perf_counter() - begun

    took: dict[tuple[str, str], list[float]] = {(one, way): [] for way in WAYS for one in ("TRL", "pm_llm")}
    with tempfile.TemporaryDirectory() as out:
        for turn in range(given.turns + 1):  # the first is not counted
            for key, found in took.items():
                found += [seconds(*key, out)][: turn > 0]
    lines = []
    for (library, way), found in took.items():
        ratio = {
            name: statistics.median(a / b for a, b in zip(took[other], found, strict=True))
            for name, other in (("to TRL", ("TRL", way)), ("to padded", (library, "padded")))
        }
        lines.append({"library": library, "rows": way, "tokens/s": tokens / statistics.median(found), **ratio})
    show(lines, given.out)


if __name__ == "__main__":
    main()
