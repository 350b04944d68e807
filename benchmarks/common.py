"""What the benchmarks share: a table, its JSON, and a watch on this process's memory."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pm_llm.system.coerce import read_yaml

STATUS = Path("/proc/self/status")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the module's docstring as help, and `--out`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="JSON file to write")
    return made


def show(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print rows as one table, and write them."""
    print(plain(rows))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def plain(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    return "\n".join(lines)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """As JSONL; returns where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def superni_chats(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a task of SuperNI as chats of a question and its answer."""
    task = json.loads((folder / f"{split}.json").read_text())
    return [
        {
            "messages": [
                {"role": "user", "content": f"{task['Definition'][0]}\n\n{one['input'][:600]}"},
                {"role": "assistant", "content": one["output"][0]},
            ]
        }
        for one in task["Instances"][:count]
    ]


def keys_of(words: list[str]) -> dict[str, Any]:
    """Keys of the configuration from a command line's `--key value` pairs."""
    return {key.removeprefix("--"): read_yaml(value) for key, value in zip(words[::2], words[1::2], strict=True)}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """After the block the list holds one number: by how many bytes resident memory rose within it, at its highest.

    The kernel's own mark, so nothing is missed; pages of mapped files count, though the system may drop them.
    """
    import torch

    from pm_llm.system.processes import Clock

    found: list[int] = []
    clock = Clock(torch.device("cpu"))
    before = int(re.findall(r"VmRSS:\s+(\d+) kB", STATUS.read_text())[0]) * 1024
    try:
        yield found
    finally:
        clock.stop("block")
        found.append(clock.peak_memory["block"] - before)
