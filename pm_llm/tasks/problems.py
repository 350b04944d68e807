"""Everything that is wrong with a run's rows, gathered first and told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pm_llm.errors import PmLlmError

SHOWN = 200
ALONE = 3  # rows of a file with the same thing wrong that are told one by one


@dataclass
class Problems:
    """What was found wrong, each with its place (`file:line`).

    Args:
        drop: Leave out bad rows and count them, instead of refusing them all. What concerns no single row (a missing
            file, an empty split) is refused all the same.
    """

    drop: bool = False
    found: list[str] = field(default_factory=list)
    dropped: dict[str, set[str]] = field(default_factory=dict)
    rows: int = 0

    def row(self, place: str, what: str) -> None:
        """A bad row at `place`; the caller leaves it out."""
        if self.drop:
            self.dropped.setdefault(place.rpartition(":")[0] or place, set()).add(place)
            return
        self.rows += 1
        self.add(place, what)

    def add(self, place: str, what: str) -> None:
        """Something wrong that leaving out a row cannot mend."""
        self.found.append(f"{place}: {what}" if place else what)

    @property
    def whole(self) -> int:
        """How much of what was found concerns no single row."""
        return len(self.found) - self.rows

    def check(self) -> None:
        """Raises PmLlmError with all that was found."""
        if not self.found:
            return
        advice = " Mend the rows, or leave them out with --bad_rows drop." if self.rows else ""
        if len(self.found) == 1:
            raise PmLlmError(self.found[0] + advice)
        told = _together(sorted(self.found, key=_by_file_and_line))
        lines = "\n  ".join(told[:SHOWN])
        more = f"\n  and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise PmLlmError(f"{len(self.found)} things are wrong with the tasks.{advice}\n  {lines}{more}")

    def summary(self) -> list[str]:
        """One line a file from which rows were left out."""
        return [f"{file}: {len(rows)} bad row{'s' * (len(rows) > 1)} left out" for file, rows in self.dropped.items()]


PLACE = re.compile(r"(.+?):(?:row )?(\d+)(?: \(row (\d+)\))?: ")


def _by_file_and_line(line: str) -> tuple[str, int]:
    found = PLACE.match(line)
    return (found[1], int(found[3] or found[2])) if found else (line, 0)


def _together(lines: list[str]) -> list[str]:
    """What is said of many rows of a file in the same words is said once, with the others' numbers."""
    groups: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        found = PLACE.match(line)
        groups.setdefault((found[1], line[found.end() :]) if found else (line, str(len(groups))), []).append(line)
    told = []
    for same in groups.values():
        others = _ranges([_by_file_and_line(line)[1] for line in same[1:]])
        told += same if len(same) <= ALONE else [f"{same[0]} (also {', '.join(others)})"]
    return told


def _ranges(numbers: list[int]) -> list[str]:
    """`[2, 3, 4, 7]` as `["2-4", "7"]`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [f"{first}-{last}" if last > first else f"{first}" for first, last in found]
