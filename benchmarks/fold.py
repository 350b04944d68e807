"""Fold and truncate at the shapes of LLaMA 7B and 70B: time, memory, and error against the dense optimum.

    python benchmarks/fold.py [--shapes 7b 70b] [--peft-modules 1] [--repeats 5] [--out FILE.json]

Synthetic adapters on q and v: a running one of rank 32 and a new one of rank 16, folded and truncated to 32, from
folders on disk to a folder on disk, as `pm-llm merge` does. PEFT's `add_weighted_adapter(combination_type="svd")` does
the same on a few modules of the same size; its time is scaled to their number. The dense optimum is the truncated SVD
in float64. Extra memory is the largest rise of resident memory, pages of the mapped input and output files included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, peak_memory, show

LAYERS = {"7b": 32, "70b": 80}
SHAPES = {"7b": ((4096, 4096), (4096, 4096)), "70b": ((8192, 8192), (1024, 8192))}
RANKS = {"running": 32, "new": 16}


def write_adapters(shape: str, folder: Path, layers: int) -> None:
    """Two adapter folders with singular values that fall off, as trained ones have."""
    import torch

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.algebra.lowrank import LowRank

    for name, rank in RANKS.items():
        torch.manual_seed(rank)
        decay = torch.logspace(0, -2, rank)
        factors = {
            f"model.layers.{i}.self_attn.{which}": LowRank(torch.randn(d_out, rank) * decay, torch.randn(rank, d_in))
            for i in range(layers)
            for which, (d_out, d_in) in zip(("q_proj", "v_proj"), SHAPES[shape], strict=True)
        }
        Adapter(factors, {"target_modules": ["q_proj", "v_proj"]}).save(folder / name)


def peft_seconds(shape: str, modules: int) -> float:
    """Of one module, with PEFT's combination of two adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    size = SHAPES[shape][0]
    net = torch.nn.ModuleDict({f"m{i}": torch.nn.Linear(size[1], size[0], bias=False) for i in range(modules)})
    names = list(net)
    made = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False)
        for name, rank in RANKS.items()
    }
    model = get_peft_model(net, made["running"], adapter_name="running")
    model.add_adapter("new", made["new"])
    started = time.perf_counter()
    model.add_weighted_adapter(["running", "new"], [1.0, 0.5], "merged", combination_type="svd", svd_rank=32)
    return (time.perf_counter() - started) / modules


def error(shape: str) -> float:
    """Relative error of one folded module against the truncated SVD of the dense sum, in float64."""
    import torch

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.merges.files import merge_folders

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(shape, folder, 1)
        running, new = Adapter.load(folder / "running"), Adapter.load(folder / "new")
        merge_folders(folder / "running", [folder / "new"], [0.5], 32, folder / "out")
        found = {name: LowRank(x.B.clone(), x.A.clone()) for name, x in Adapter.load(folder / "out").factors.items()}
        which = next(iter(found))
        dense = sum(
            s * (x.factors[which].B.double() @ x.factors[which].A.double()) for s, x in ((1.0, running), (0.5, new))
        )
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, :32] * s[:32]) @ vh[:32]
    return float((found[which].B.double() @ found[which].A.double() - best).norm() / best.norm())


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments.add_argument("--peft-modules", type=int, default=1, help="timed with PEFT at 7b; 0: none")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--write", type=Path, help="only write the adapters, into this folder")
    given = arguments.parse_args()
    if given.write:
        write_adapters(given.shapes[0], given.write, LAYERS[given.shapes[0]])
        return
    from pm_llm.merges.files import merge_folders

    rows = []
    for shape in given.shapes:
        with tempfile.TemporaryDirectory(dir=".") as name:
            folder = Path(name)
            # in a process of its own, whose freed memory would hide what a fold takes in this one
            subprocess.run([sys.executable, __file__, "--shapes", shape, "--write", folder], check=True)
            adapter = (folder / "running" / "adapter_model.safetensors").stat().st_size
            seconds, memory = [], []
            for i in range(given.repeats):
                with peak_memory() as peak:
                    started = time.perf_counter()
                    merge_folders(folder / "running", [folder / "new"], [0.5], 32, folder / f"out{i}")
                    seconds.append(time.perf_counter() - started)
                memory.append(peak[0])
        row = {
            "shapes": shape,
            "modules": 2 * LAYERS[shape],
            "seconds": statistics.median(seconds),
            "extra memory, MiB": max(memory) / 2**20,
            "an adapter, MiB": adapter / 2**20,
            "PEFT svd, seconds (scaled)": "-",
            "times as fast": "-",
            "relative error": "-",
        }
        if shape == "7b" and given.peft_modules:
            scaled = peft_seconds(shape, given.peft_modules) * 2 * LAYERS[shape]
            row |= {"PEFT svd, seconds (scaled)": scaled, "times as fast": scaled / row["seconds"]}
            row["relative error"] = f"{error(shape):.1e}"
        rows.append(row)
    show(rows, given.out)


if __name__ == "__main__":
    main()
