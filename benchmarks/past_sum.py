"""What the bounded sum of the past keeps of each task's own curvature, against all terms, by brute force.

    python benchmarks/past_sum.py [--out FILE.json]

Tasks that share no output and no input (three directions of 40 each), with vectors along them, and quadratics
`Delta' F Delta` of given sizes. Kept / exact along each task's own vector: the least and the most.
"""

from __future__ import annotations

from common import parser, show

CASES = {
    "one small, four large": [1, 20, 20, 20, 20],
    "five equal": [1] * 5,
    "thirteen": [2, 20, 20, 20, 20, 1, 20, 20, 20, 20, 20, 20, 20],
}
WIDTH, EACH = 40, 3


def main() -> None:
    """Fold, print a table, write JSON."""
    given = parser(__doc__).parse_args()
    import torch

    from pm_llm.algebra import lowrank
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.fisher.base import Room, form_of
    from pm_llm.fisher.kronecker import Kronecker
    from pm_llm.fisher.row_column import Factored

    rows = []
    for form in ("kronecker", "factored"):
        for name, sizes in CASES.items():
            for pairs in (4, 32):
                torch.manual_seed(0)
                Q, P = (torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] for _ in range(2))
                if form == "factored":  # a diagonal knows axes only
                    Q = P = torch.eye(WIDTH)
                past, merged, tasks = None, None, []
                for k, size in enumerate(sizes):
                    q, p = Q[:, EACH * k : EACH * (k + 1)], P[:, EACH * k : EACH * (k + 1)]
                    vector = LowRank(q @ torch.randn(EACH, 2), torch.randn(2, EACH) @ p.T)
                    whole = Factored(q.square().sum(1), p.square().sum(1))
                    fisher = Kronecker(q @ q.T, p @ p.T) if form == "kronecker" else whole
                    fisher = fisher.divided(fisher.inner(vector, vector) / size)
                    before, merged = merged, vector if merged is None else lowrank.add(merged, vector)
                    past = form_of(form).past.plus(past, fisher, merged, Room(pairs=pairs), merged, before)
                    tasks.append((fisher, vector))
                kept = [past.along(v) / sum(f.inner(v, v) for f, _ in tasks) for _, v in tasks]
                found = {"form": form, "tasks": name, "pairs": pairs, "least kept": min(kept), "most kept": max(kept)}
                along, exact = past.kept_along()
                rows.append({**found, "told as off": max(abs(a / e - 1) for a, e in zip(along, exact, strict=True))})
    show(rows, given.out)


if __name__ == "__main__":
    main()
