"""Everything that is wrong with a run's rows, gathered first and told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError

SHOWN = 200
PLACE = re.compile(r"(.+?):(?:row )?(\d+)(?: \(row (\d+)\))?")  # of a row
Found = tuple[str, str]  # a place, or "", and what is wrong there
ALONE = 3  # rows of a file with the same thing wrong that are told one by one


@dataclass
class Problems:
    """What was found wrong, each with its place (`file:line`).

    Args:
        drop: Leave out bad rows and count them, instead of refusing them all. What concerns no single row (a missing
            file, an empty split) is refused all the same.
    """

    drop: bool = False
    found: list[Found] = field(default_factory=list)
    seen: set[Found] = field(default_factory=set)
    dropped: dict[str, set[str]] = field(default_factory=dict)
    rows: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    files: list[tuple[Path, int, int]] = field(default_factory=list)

    def opened(self, path: Path) -> None:
        """A file is read: it is noted with its size and time of change."""
        if path.is_file():
            self.files.append((path.absolute(), path.stat().st_size, path.stat().st_mtime_ns))

    def note(self, what: str) -> None:
        """Something to know that is not wrong, told once."""
        self.notes[what] = None

    def row(self, place: str, what: str) -> None:
        """A bad row at `place`; the caller leaves it out."""
        if self.drop:
            self.dropped.setdefault(place.rpartition(":")[0] or place, set()).add(place)
        elif not place or (place, what) not in self.seen:  # of a probe, training and test rows are the same
            self.seen.add((place, what))
            self.rows += 1
            self.add(place, what)

    def add(self, place: str, what: str) -> None:
        """Something wrong that leaving out a row cannot mend."""
        self.found.append((place, what))

    @property
    def whole(self) -> int:
        """How much of what was found concerns no single row."""
        return len(self.found) - self.rows

    def check(self) -> None:
        """Raises PmLlmError with all that was found."""
        if not self.found:
            return
        columns = sum(what.startswith("column ") for _, what in self.found)
        advice = " Say what the columns are called (`prompt: question`)." if columns else ""
        if self.rows > columns:
            advice += " Mend the rows, or leave them out with --bad_rows drop."
        if len(self.found) == 1:
            raise PmLlmError(_line(self.found[0]) + advice)
        told = _together(sorted(self.found, key=_by_file_and_line))
        lines = "\n  ".join(told[:SHOWN])
        more = f"\n  and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise PmLlmError(f"{len(self.found)} things are wrong with the tasks.{advice}\n  {lines}{more}")

    def tell(self) -> None:
        """Raises PmLlmError as :meth:`check`; else says, a line a file, how many rows were left out."""
        from pm_llm.system.progress import say

        self.check()
        for line in self.summary():
            say(line)

    def summary(self) -> list[str]:
        """One line a file from which rows were left out, and the notes."""
        lines = [f"{file}: {len(rows)} bad row{'s' * (len(rows) > 1)} left out" for file, rows in self.dropped.items()]
        return [*lines, *self.notes]


def _line(found: Found) -> str:
    return ": ".join(part for part in found if part)


def _by_file_and_line(found: Found) -> tuple[str, int]:
    row = PLACE.fullmatch(found[0])
    return (row[1], int(row[3] or row[2])) if row else (_line(found), 0)


def _together(all_found: list[Found]) -> list[str]:
    """Problems that many rows of a file share are told once, with the numbers of those rows."""
    groups: dict[Any, list[Found]] = {}
    for found in all_found:
        row = PLACE.fullmatch(found[0])
        groups.setdefault((row[1], found[1]) if row else len(groups), []).append(found)
    told: list[str] = []
    for same in groups.values():
        if len(same) <= ALONE:
            told += map(_line, same)
        else:
            others = _ranges([_by_file_and_line(found)[1] for found in same[1:]])
            told.append(f"{_line(same[0])} (also {', '.join(others)})")
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
