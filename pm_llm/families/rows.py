"""Encoded rows that lie in an Arrow file mapped into memory, beside those in a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from datasets import Dataset, Features, Value, concatenate_datasets

from pm_llm.families.base import Row


class TableRows(Sequence[Row]):
    """The rows of a dataset, read one by one."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> TableRows: ...
    def __getitem__(self, i: int | slice) -> Row | TableRows:
        if isinstance(i, slice):
            return TableRows(self.dataset.select(range(*i.indices(len(self)))))
        found: Row = self.dataset[i]
        return found

    def __iter__(self) -> Iterator[Row]:
        yield from self.dataset


def table_of(rows: Sequence[Row]) -> Dataset:
    """Rows as a dataset."""
    if isinstance(rows, TableRows):
        return rows.dataset
    columns = dict.fromkeys(key for row in rows for key in row)  # those of the first row are not those of all
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})


def features_of(row: Row) -> Features:
    """Columns of tokens, for a file of such rows."""
    return Features({key: [Value("int32")] for key in row})


def with_columns(rows: Sequence[Row], columns: dict[str, list[float]]) -> Sequence[Row]:
    """The rows with a number more each, by name."""
    if not isinstance(rows, TableRows):
        return [{**row, **{key: x[i] for key, x in columns.items()}} for i, row in enumerate(rows)]
    table = rows.dataset
    for key, x in columns.items():
        table = table.add_column(key, x)
    return TableRows(table)


def joined(rows: Sequence[Row], others: Sequence[Row]) -> Sequence[Row]:
    """Rows and then others; columns that only some have are empty in the rest."""
    if not isinstance(rows, TableRows):
        return [*rows, *others]
    if not others:
        return rows
    more, own = table_of(others), rows.dataset.features
    shared = Features({key: own.get(key, feature) for key, feature in more.features.items()})
    return TableRows(concatenate_datasets([rows.dataset, more.cast(shared)]))


def longest(rows: Sequence[Row], length: Callable[[Row], int]) -> Row:
    """The row with most tokens."""
    if not isinstance(rows, TableRows):
        return max(rows, key=length)
    import numpy as np
    from pyarrow import compute

    table: Any = rows.dataset.with_format("arrow")[:]
    lengths = [compute.list_value_length(table[key]).to_numpy() for key in table.column_names if key.endswith("ids")]
    return rows[int(np.argmax(sum(lengths)))]
