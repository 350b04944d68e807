"""The adapters of one run routed in place of merged, by each router: how many prompts went to their own task's
adapter, and the final average.

    python benchmarks/routing.py RUN [--out JSON]    # RUN of the preset per_task
"""

from __future__ import annotations

from typing import Any

import records
from common import parser, show


def main() -> None:
    """A row a router; intervals over test rows, of the same draws as in the tables of records."""
    from pm_llm.evaluation import routing

    made = parser(__doc__)
    made.add_argument("run", metavar="RUN")
    given = made.parse_args()
    rows: list[dict[str, Any]] = []
    for router in routing.ROUTERS:
        found = routing.route(given.run, router)
        one = {"name": router, "order": "given", "seed": 0, "rows": records.scored(found.predictions)}
        average = "{:.1f} ({:.1f} to {:.1f})".format(*records.interval(records.averages([one])[router]))
        sent = [i == task for task, each in enumerate(found.sent) for i in each]
        right = f"{100 * sum(sent) / len(sent):.1f} %" if sent else "-"
        kept = found.kept_bytes / 2**20
        rows.append({"router": router, "sent right": right, "final average": average, "kept, MiB": kept})
    show(rows, given.out)


if __name__ == "__main__":
    main()
