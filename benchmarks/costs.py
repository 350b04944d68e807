"""What continual learning adds to plain LoRA at the shapes of LLaMA models: bytes, and time beside the model's own.

    python benchmarks/costs.py [--shapes 1b 7b 13b 70b] [--tokens 512] [--out FILE.json]

Every part runs the project's own code on one module of each shape of a layer, with random values, and counts times the
modules of the whole model: so a model of any size is measured on a small machine. Bytes are those of the tensors that
the code makes. Times are on this CPU, one thread, float32, as a share of the same modules' own forward and backward on
all rows of a task (attention and the rest of the model left out, so that shares come out too large); `--rows` rows,
`--batch` rows a step, the Fisher on 128. Past tasks: `--tasks`, each of rank 8; the running adapter has rank 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import parser, show

# hidden, intermediate, layers, width of keys and values
SHAPES = {
    "1b": (2048, 8192, 16, 512),
    "7b": (4096, 11008, 32, 4096),
    "13b": (5120, 13824, 40, 5120),
    "70b": (8192, 28672, 80, 1024),
}
FISHER_ROWS, RANK, TOP = 128, 8, 64
GIB = 2**30


def modules_of(shape: str, which: str) -> dict[tuple[int, int], int]:
    """How many modules of each (d_out, d_in) are adapted."""
    d, wide, layers, narrow = SHAPES[shape]
    found: dict[tuple[int, int], int] = {}
    sizes = (
        [(d, d), (narrow, d)] if which == "q,v" else [(d, d)] * 2 + [(narrow, d)] * 2 + [(wide, d)] * 2 + [(d, wide)]
    )
    for size in sizes:
        found[size] = found.get(size, 0) + layers
    return found


def seconds(run: Callable[[], Any], turns: int) -> float:
    """The least of some turns, after one that warms up."""
    run()
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def nbytes(tensors: Any) -> int:
    """Of tensors, or of a mapping's."""
    return sum(x.numel() * x.element_size() for x in (tensors.values() if isinstance(tensors, dict) else tensors))


def measure(d_out: int, d_in: int, given: Any) -> dict[str, float]:
    """Of one module: bytes, and seconds a row, a step or a task."""
    import torch

    from pm_llm.algebra import lowrank
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.fisher.base import Layer, Room, form_of
    from pm_llm.fisher.together import Together

    torch.manual_seed(0)
    tokens = given.tokens
    x, g = torch.randn(1, tokens, d_in), torch.randn(1, tokens, d_out) / tokens
    weight = torch.nn.Parameter(torch.randn(d_out, d_in))
    live = LowRank(torch.randn(d_out, RANK).requires_grad_(), torch.randn(RANK, d_in).requires_grad_())
    layer, found = Layer((d_out, d_in), LowRank(live.B.detach(), live.A.detach())), {}

    def own() -> None:  # forward, the gradient of the inputs, and LoRA's own
        inputs = x.requires_grad_()
        ((inputs @ weight.detach().T + inputs @ live.A.T @ live.B.T) * g).sum().backward()

    found["row"] = seconds(own, given.turns)
    for form in ("factored", "kronecker", "factors"):
        kind = form_of(form)
        sums = kind.blank(layer, torch.zeros)
        found[f"{form}: row"] = seconds(lambda k=kind, s=sums: k.add(s, x.detach(), g, layer), given.turns)
        found[f"{form}: sums"] = nbytes(sums)
    past, room, running = None, Room(), None
    for task in range(given.tasks):
        torch.manual_seed(task)
        rows = torch.randn(1, 64, d_in)
        sums = form_of("kronecker").blank(layer, torch.zeros)
        form_of("kronecker").add(sums, rows, torch.randn(1, 64, d_out), layer)
        fisher = form_of("kronecker")(**sums)
        theta = LowRank(torch.randn(d_out, RANK), torch.randn(RANK, d_in))
        at = theta if running is None else lowrank.truncate(lowrank.add(running, theta), TOP)[0]
        started = time.perf_counter()
        past = form_of("kronecker").past.plus(past, fisher, theta, room, at, running)
        found["merge"] = time.perf_counter() - started
        running = at
    assert past is not None
    assert running is not None
    grown = lowrank.add(running, theta)
    found["truncation"] = seconds(lambda: lowrank.truncate(grown, TOP), given.turns)
    found["past"] = nbytes(past.tensors())
    together = Together({"": past})
    together({"": live})
    found["penalty: step"] = seconds(lambda: sum(together({"": live})).backward(), given.turns)
    found["penalty"] = nbytes(past.terms.tensors()) + nbytes([past.g.B, past.g.A])
    found["adapter"] = 4 * RANK * (d_out + d_in)
    found["fold"] = 2 * d_out * d_in
    found["dense"] = 4 * d_out * d_in
    return found


def main() -> None:
    """Measure every shape of module once, add up, print two tables, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000])
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--tasks", type=int, default=8)
    arguments.add_argument("--turns", type=int, default=2)
    given = arguments.parse_args()
    import torch

    torch.set_num_threads(1)
    known: dict[tuple[int, int], dict[str, float]] = {}
    memory, times = [], []
    for shape in given.shapes:
        for which in ("q,v", "all-linear"):
            counts, every = modules_of(shape, which), modules_of(shape, "all-linear")
            for size in every:
                if size not in known:
                    known[size] = measure(*size, given)
            total = {key: sum(known[s][key] * n for s, n in counts.items()) for key in next(iter(known.values()))}
            row = sum(known[s]["row"] * n for s, n in every.items())  # of all linear layers, whichever are adapted
            model = {"model": shape, "adapted": which}
            memory.append(
                {
                    **model,
                    "Fisher, dense": total["dense"] / GIB,
                    "factored": total["factored: sums"] / GIB,
                    "Kronecker (device)": total["kronecker: sums"] / GIB,
                    "penalty (device)": total["penalty"] / GIB,
                    "past (host)": total["past"] / GIB,
                    "base copy (host, above 4 in files)": total["fold"] / GIB,
                    "a checkpoint": 3 * total["adapter"] / GIB,
                }
            )
            for rows in given.rows:
                task, steps = rows * row, rows / given.batch
                parts = {
                    "loss before": FISHER_ROWS * row / 3,
                    "Fisher pass": FISHER_ROWS * row,
                    "Kronecker sums": FISHER_ROWS * total["kronecker: row"],
                    "penalty": steps * total["penalty: step"],
                    "merge": total["merge"] + total["truncation"],
                }
                shares = {f"{key}, %": 100 * value / task for key, value in parts.items()}
                times.append({**model, "rows": rows, **shares, "all, %": sum(shares.values())})
    print("GiB, of float32 where it is the project's own; the copy of the base in bfloat16")
    show(memory, given.out)
    print()
    show(times, given.out and given.out.with_suffix(".time.json"))


if __name__ == "__main__":
    main()
