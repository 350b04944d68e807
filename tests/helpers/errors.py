"""Runs that are refused, in one line."""

from __future__ import annotations


def one_line(code: int, error: str, *expected: str) -> None:
    lines = [line for line in error.strip().splitlines() if line.startswith("pm-llm: error:")]
    assert code == 2, error
    assert len(lines) == 1, error
    for text in expected:
        assert text in lines[0], lines[0]
    assert "Traceback" not in error
