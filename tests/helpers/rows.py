"""Files of rows, and runs of them."""

from __future__ import annotations

import json
from pathlib import Path

from pm_llm.cli import main


def run_of(model: str, data: Path, out: Path, *more: str) -> Path:
    keys = ["--model", model, "--tasks", str(data), "--output_dir", str(out), "--train.max_steps", "1"]
    assert main(["run", *keys, "--max_length", "64", "--fisher.samples", "2", *more]) == 0
    return out


def rows(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"is it {i} ?", "completion": "yes"}) + "\n" for i in range(count)))
    return path
