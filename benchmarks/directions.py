"""What it costs, in time and error, to sketch a Kronecker Fisher's moments and cut them to their leading directions.

    python benchmarks/directions.py [--size 4096] [--directions 32] [--turns 3] [--out FILE.json]

One side with eigenvalues that fall as i^-2, i^-1 and i^-0.5: the relative error (Frobenius) of its leading directions
and the diagonal of the rest, from the whole matrix and from its sketch, and the seconds of both cuts (the median of
the turns) and of a decomposition (once).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from common import parser, show


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--size", type=int, default=4096)
    arguments.add_argument("--directions", type=int, default=32)
    arguments.add_argument("--turns", type=int, default=3)
    given = arguments.parse_args()
    import torch

    from pm_llm.fisher import moments

    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(given.size, given.size))[0]

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        """The median of the seconds it takes, and what it gives."""
        seconds = []
        for _ in range(given.turns):
            started = time.perf_counter()
            found = work()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), found

    rows = []
    for power in (2.0, 1.0, 0.5):
        whole = (basis * torch.arange(1.0, given.size + 1) ** -power) @ basis.T
        sketch = torch.cat([whole @ moments.test_matrix(given.size, whole.device), whole.diagonal()[:, None]], dim=1)
        row: dict[str, Any] = {"size": given.size, "eigenvalues": f"i^-{power:g}"}
        for name, M in (("whole", whole), ("sketch", sketch)):
            took, side = timed(lambda M=M: moments.sides(M, given.directions))
            kept = side.U.T @ (side.G[0].T @ side.G[0]) @ side.U + side.d[0].diag()
            row |= {f"{name}: error": float((kept - whole).norm() / whole.norm()), f"{name}: seconds": took}
        rows.append(row)
    started = time.perf_counter()  # the same for all of them
    torch.linalg.eigh(whole.double())
    took = time.perf_counter() - started
    show([{**row, "decomposed: seconds": took} for row in rows], given.out)


if __name__ == "__main__":
    main()
