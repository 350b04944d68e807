"""Everything that is wrong with a run's rows, gathered first and told at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pm_llm.errors import PmLlmError

SHOWN = 200


@dataclass
class Problems:
    """What was found wrong, each with its place (`file:line`).

    Args:
        drop: Leave out bad rows and count them, instead of refusing them all. What concerns no single row (a missing
            file, an empty split) is refused all the same.
    """

    drop: bool = False
    found: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0

    def row(self, place: str, what: str) -> None:
        """A bad row at `place`; the caller leaves it out."""
        if self.drop:
            self.dropped[place.rpartition(":")[0] or place] += 1
            return
        self.rows += 1
        self.add(place, what)

    def add(self, place: str, what: str) -> None:
        """Something wrong that leaving out a row cannot mend."""
        self.found.append(f"{place}: {what}" if place else what)

    def check(self) -> None:
        """Raises PmLlmError with all that was found."""
        if not self.found:
            return
        advice = " Mend the rows, or leave them out with --bad_rows drop." if self.rows else ""
        if len(self.found) == 1:
            raise PmLlmError(self.found[0] + advice)
        lines = "\n  ".join(self.found[:SHOWN])
        more = f"\n  and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        raise PmLlmError(f"{len(self.found)} things are wrong with the tasks.{advice}\n  {lines}{more}")

    def summary(self) -> list[str]:
        """One line a file from which rows were left out."""
        return [f"{place}: {n} bad row{'s' if n > 1 else ''} left out" for place, n in self.dropped.items()]
