"""Rows of JSONL, JSON, CSV and Parquet files, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError, did_you_mean, first_line, near_file
from pm_llm.tasks.problems import Problems

PACKED = (".gz", ".zst")
SEPARATORS = (",", ";", "\t", "|")
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Row:
    """One row's columns, and where it stands: `file:line`, `file:line (row n)` in a JSON array, or `file:row n`."""

    values: dict[str, Any]
    place: str

    def text(self, column: str, problems: Problems) -> str | None:
        """The text in `column`; None, with the reason in `problems`, if there is none that can be used."""
        if column not in self.values:
            names = tuple(map(str, self.values))
            there = ", ".join(names) or "none"
            problems.row(
                self.place, f"column {column!r} is missing; the row has {there}.{did_you_mean(column, names)}"
            )
            return None
        return self.check_text(self.values[column], column, problems)

    def check_text(self, value: Any, column: str, problems: Problems) -> str | None:
        """`value`, if it is text that can be encoded."""
        if not isinstance(value, str):
            problems.row(self.place, f"{column} is {short(value)} ({type(value).__name__}); it must be text.")
            return None
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            problems.row(self.place, f"{column} is not valid UTF-8 at character {error.start}.")
            return None
        return value


def kind_of(path: Path) -> str | None:
    """The suffix by which a file is read, without that of a compression; None: it is of no kind that is."""
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in READERS and (suffix != ".parquet" or path.suffix not in PACKED) else None


def stem_of(path: Path) -> str:
    """A file's name without what says its kind."""
    kind = kind_of(path)
    if kind is None:
        return path.stem
    return path.name.removesuffix(path.suffix if path.suffix in PACKED else "").removesuffix(kind)


def read_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """The rows of a file, by its suffix, one after the other. What cannot be read goes to `problems`."""
    kind = kind_of(path)
    problems.opened(path)
    if kind is None:
        allowed = f"{', '.join(READERS)}, and all but Parquet with {' or '.join(PACKED)}"
        problems.add(str(path), f"files of kind {path.suffix!r} cannot be read. Allowed: {allowed}.")
    elif not path.is_file():
        problems.add(str(path), f"does not exist.{near_file(path)}")
    elif path.stat().st_size:
        try:
            yield from READERS[kind](path, problems)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            problems.add(str(path), f"is not a whole gzip file: {error}.")
        except OSError as error:
            if path.suffix != ".zst":
                raise
            problems.add(str(path), f"is not a whole zstandard file: {first_line(error)}.")


def read_json(path: Path, problems: Problems) -> Any:
    """A whole JSON file; None, with the reason in `problems`, if there is none."""
    problems.opened(path)
    try:
        return json.loads(_decoded(path))
    except FileNotFoundError:
        problems.add(str(path), "is missing.")
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}", f"is not valid JSON: {error.msg}.")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        problems.add(str(path), f"is JSON that cannot be read: {error}.")
    return None


def json_array(path: Path, problems: Problems, key: str | None = None) -> Iterator[Row]:
    """The objects of a JSON array: the file's, or the one under its top-level `key`."""
    whole = read_json(path, problems)
    found = whole.get(key) if key is not None and isinstance(whole, dict) else whole
    if whole is None:
        return
    if not isinstance(found, list):
        problems.add(str(path), "holds no list of rows" + (f" under {key!r}." if key else "."))
        return
    # the same again, to learn the line of each row
    text, decoder = _decoded(path), json.JSONDecoder()
    opening = re.compile(r"\s*\[" if key is None else rf'"{re.escape(key)}"\s*:\s*\[').search(text)
    at, line, counted = opening.end() if opening else 0, 1, 0
    for number, value in enumerate(found, start=1):
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        yield from _object(value, f"{path}:{line} (row {number})", problems)
        _, at = decoder.raw_decode(text, at)


def text_pairs(path: Path, columns: tuple[str, str], problems: Problems) -> Iterator[tuple[str, str, str]]:
    """(text, answer, place) of the rows of a JSON array that have both."""
    for row in json_array(path, problems):
        text, answer = (row.text(column, problems) for column in columns)
        if text is not None and answer is not None:
            yield text, answer, row.place


def is_there(path: Path, advice: str, problems: Problems, optional: bool = False, folder: bool = False) -> bool:
    """Whether a file (or folder) is there; if not, and it must be, `problems` says so."""
    found = path.is_dir() if folder else path.is_file()
    if not found and not optional:
        problems.add(str(path), f"is missing. {advice}")
    return found


def _json(path: Path, problems: Problems) -> Iterator[Row]:
    """An array of rows, or a row a line."""
    if _row_a_line(path):
        yield from _jsonl(path, problems)
        return
    text = _decoded(path).strip()
    if text.startswith("["):
        yield from json_array(path, problems)
    elif text.startswith("{") and (key := _wrapping(text)) is not None:
        yield from json_array(path, problems, key)
    elif text.split("\n", 1)[0].strip() == "{":
        problems.add(str(path), "is one JSON object over several lines. Give a list of rows, or a row a line.")
    else:
        yield from _jsonl(path, problems)


def _row_a_line(path: Path) -> bool:
    """Whether its first line is an object by itself, and another line follows: nothing more of it need be read."""
    lines = (line for line in _lines(path) if line.strip())
    try:
        found = isinstance(json.loads(next(lines, "null")), dict)
    except (ValueError, RecursionError):
        return False
    return found and next(lines, None) is not None


def _wrapping(text: str) -> str | None:
    """The key of the one list of rows in a JSON object that is the whole file; None if it is no such object."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    lists = [k for k, x in whole.items() if isinstance(x, list) and x and all(isinstance(row, dict) for row in x)]
    return lists[0] if len(lists) == 1 else None


def _jsonl(path: Path, problems: Problems) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.row(f"{path}:{number}", f"is not valid JSON: {error.msg} at character {error.pos}.")
        except (ValueError, RecursionError) as error:
            problems.row(f"{path}:{number}", f"is JSON that cannot be read: {error}.")
        else:
            yield from _object(value, f"{path}:{number}", problems)


def _object(value: Any, place: str, problems: Problems) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, place)
    else:
        problems.row(place, f"is {short(value)}; a row must be an object with columns.")


def _csv(path: Path, problems: Problems) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in _lines(path):
            taken += 1
            yield line

    try:
        first = next((line for line in _lines(path) if line.strip()), "")
        reader, header = csv.reader(lines(), strict=True, delimiter=_separator(first)), None
        while True:
            place = f"{path}:{taken + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problems.row(place, f"is not valid CSV: {error}.")
                continue
            if not cells:
                continue
            if header is None:
                header = cells
                twice = [name for name, n in Counter(header).items() if n > 1]
                if twice:
                    problems.add(place, f"column {twice[0]!r} occurs twice in the header.")
                    return
            elif len(cells) != len(header):
                problems.row(place, f"has {len(cells)} cells; the header has {len(header)} columns.")
            else:
                yield Row(dict(zip(header, cells, strict=True)), place)
    finally:
        csv.field_size_limit(limit)


def _separator(header: str) -> str:
    """What makes most columns of a header; a comma where none makes more."""
    return max(SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _parquet(path: Path, problems: Problems) -> Iterator[Row]:
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ArrowException, Table
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:  # a name would be taken for a pattern
            done, parts = 0, ParquetFile(file)
            for part in parts.iter_batches(batch_size=1000):
                rows = Dataset(InMemoryTable(Table.from_batches([part])))
                yield from dataset_rows(rows, str(path), done)
                done += len(rows)
    except (ValueError, OSError, ArrowException) as error:
        problems.add(str(path), f"cannot be read as parquet: {first_line(error)}")


def dataset_rows(rows: Any, name: str, before: int = 0) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, numbered after `before` others; class labels become their names, and columns
    of whole numbers text. What a table must have in every nested value, and a row does not, is left out of it."""
    from datasets import ClassLabel, Value

    if not hasattr(rows, "features"):
        raise PmLlmError(
            f"{name}: a {type(rows).__name__} is no dataset of rows. Give a Dataset, or a list of mappings."
        )
    rows = rows.with_format(None)  # of numbers and texts, not tensors
    words: dict[str, Callable[[Any], Any]] = {}
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, ClassLabel):
            words[column] = dict(enumerate(feature.names)).get  # -1, a hidden label, becomes None
        elif isinstance(feature, Value) and "int" in feature.dtype:
            words[column] = str
        elif not isinstance(feature, Value):
            words[column] = _without_nothing
    for number, values in enumerate(rows, start=before + 1):
        named = {c: words[c](v) if c in words and v is not None else v for c, v in values.items()}
        yield Row(named, f"{name}:row {number}")


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(x) for key, x in value.items() if x is not None}
    return [_without_nothing(x) for x in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path, Problems], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _decoded(path: Path) -> str:
    # bytes that are no UTF-8 become lone surrogates, which Row.check_text finds in the row that holds them
    with _opened(path) as file:
        return str(file.read().decode("utf-8-sig", errors="surrogateescape")).replace("\r\n", "\n")


def _lines(path: Path) -> Iterator[str]:
    """The same line by line, of which no more is held than one."""
    with _opened(path) as file:
        for number, line in enumerate(file):
            text = line.decode("utf-8" if number else "utf-8-sig", errors="surrogateescape")
            yield text.removesuffix("\r\n") + "\n" if text.endswith("\r\n") else text


def _opened(path: Path) -> Any:
    """A file's bytes, without its compression."""
    if path.suffix == ".zst":
        from pyarrow import input_stream

        return io.BufferedReader(input_stream(str(path), compression="zstd"))
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def short(value: Any) -> str:
    """`value` as code, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
