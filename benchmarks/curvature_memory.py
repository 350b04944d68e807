"""Memory that two folds with a dense Fisher take, with the sums in memory and in mapped files.

    python benchmarks/curvature_memory.py [--modules 8] [--size 2048] [--out FILE.json]

Each way runs in a process of its own, on synthetic adapters and Fishers. Anonymous memory is what cannot be written
out and dropped; pages of mapped files can. glibc keeps freed blocks of up to 32 MiB unless MALLOC_MMAP_THRESHOLD_ says
otherwise, so each way is measured with and without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common


def fold(storage: str, modules: int, size: int, folder: Path) -> dict[str, float]:
    """Fold two tasks; peak of anonymous memory above that before, in bytes, and seconds."""
    import torch

    from pm_llm import Adapter, Merger
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.system.mapped import mapped_files

    torch.manual_seed(0)
    zeros = mapped_files(folder) if storage == "disk" else torch.zeros
    names = [f"layers.{i}.q_proj" for i in range(modules)]
    merger, running = Merger("optimal", max_rank=32), None
    merger.rule.zeros = zeros
    done, peaks = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peaks[0] = max(peaks[0], anonymous())
            time.sleep(0.002)

    before, started = anonymous(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        new = Adapter({n: LowRank(torch.randn(size, 8), torch.randn(8, size)) for n in names})
        fisher = {n: zeros(size, size).uniform_() for n in names}
        running = merger.fold(running, new, fisher)
    done.set()
    watcher.join()
    return {"anonymous_bytes": peaks[0] - before, "seconds": time.perf_counter() - started}


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", common.STATUS.read_text())[0]) * 1024


def main() -> None:
    """Measure both, print a table, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--modules", type=int, default=8)
    parser.add_argument("--size", type=int, default=2048, help="of a square weight matrix")
    parser.add_argument("--storage", choices=("memory", "disk"), help="measure this one, in this process")
    given = parser.parse_args()
    if given.storage:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            print(json.dumps(fold(given.storage, given.modules, given.size, Path(folder))))
        return
    found = {}
    for storage in ("memory", "disk"):
        words = [sys.executable, __file__, "--storage", storage, "--modules", str(given.modules)]
        for name, setting in (("", {}), (", blocks given back", {"MALLOC_MMAP_THRESHOLD_": "1000000"})):
            environment = {**os.environ, **setting}
            done = subprocess.run(
                [*words, "--size", str(given.size)], capture_output=True, text=True, check=True, env=environment
            )
            found[storage + name] = json.loads(done.stdout.splitlines()[-1])
    copy = given.modules * given.size**2 * 4
    print(f"{given.modules} matrices of {given.size} x {given.size}: {copy / 2**20:.0f} MiB a copy of the Fisher")
    rows = []
    for storage, one in found.items():
        size = one["anonymous_bytes"]
        row = {"sums in": storage, "anonymous memory, MiB": size / 2**20, "in copies": size / copy}
        rows.append({**row, "seconds": one["seconds"]})
    common.show(rows, given.out)


if __name__ == "__main__":
    main()
