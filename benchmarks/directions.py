"""What cutting a Kronecker Fisher to its leading directions costs, and how good the cut is, against a decomposition.

    python benchmarks/directions.py [--size 4096] [--directions 32] [--turns 3] [--out FILE.json]

One square module whose two sides have eigenvalues that fall as 1 / k. The median of the turns, in seconds: of the cut
of both sides with its error, and of both decompositions. The error is what is left of a side, relative to the least
that can be.
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

    from pm_llm.fisher.base import Room
    from pm_llm.fisher.kronecker import Kronecker

    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(given.size, given.size))[0]
    values = 1 / torch.arange(1.0, given.size + 1)
    side = (basis * values) @ basis.T

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        """The median of the seconds it takes, and what it gives."""
        seconds = []
        for _ in range(given.turns):
            started = time.perf_counter()
            found = work()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), found

    cut, kept = timed(lambda: Kronecker(side, side).kept(Room(directions=given.directions)))
    whole, (values, _) = timed(lambda: torch.linalg.eigh(side.double()))
    V = (kept.C.G[0] @ kept.C.U).double()
    error = float((side - V.T @ V).norm() / values[: -given.directions].norm())
    show(
        [{"size": given.size, "cut": cut, "decomposed": 2 * whole, "times": 2 * whole / cut, "error": error}],
        given.out,
    )


if __name__ == "__main__":
    main()
