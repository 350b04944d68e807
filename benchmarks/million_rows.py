"""Whether a start grows with the rows: memory and seconds until training begins, the first and the second time.

    python benchmarks/million_rows.py --model DIR [--rows 1000000] [--words 150] [--out FILE.json]

Chats of a question and an answer are written to a JSONL file; a run is begun on it in a process of its own, which is
stopped after its first training steps. Measured are seconds until rows are read and checked, looked at, and encoded,
and resident memory: all of it, and without pages of mapped files, which the system may take back at any time. The same
again on a hundredth of the rows gives what the model and the libraries need.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import show

START = """
import json, sys, threading, time
from pm_llm import ContinualSequence
from pm_llm.config import load_config
from pm_llm.session import Watcher
from pm_llm.training.one_task import SaveSteps

most = {"RssAnon": 0, "VmRSS": 0}

def look() -> None:
    while True:
        for line in open("/proc/self/status"):
            key = line.partition(":")[0]
            if key in most:
                most[key] = max(most[key], int(line.split()[1]))
        time.sleep(0.05)

threading.Thread(target=look, daemon=True).start()
begun, marks = time.perf_counter(), {}

def mark(name: str) -> None:
    marks[name] = round(time.perf_counter() - begun, 1)

class Stop(Exception):
    pass

class Marks(Watcher):
    def loaded(self, session):
        mark("looked at")

def begin(self, args, state, control, **kwargs):
    mark("training begins")

def step(self, args, state, control, **kwargs):
    mark("two steps")
    raise Stop

SaveSteps.on_train_begin = begin
SaveSteps.on_step_end = lambda self, a, s, c, **k: step(self, a, s, c) if s.global_step == 2 else None
config = load_config(None, json.loads(sys.argv[1]))
run = ContinualSequence(config, watchers=[Marks()])
mark("read and checked")
try:
    run.run()
except Stop:
    pass
mib = {key: round(x / 1024) for key, x in most.items()}
print("MEASURED " + json.dumps({"seconds": marks, "MiB anonymous": mib["RssAnon"], "MiB resident": mib["VmRSS"]}))
"""
WORDS = (
    "the of a to in is it you that he was for on are with as his they be at one have this from or had by hot but some"
)


def write(path: Path, rows: int, words: int) -> None:
    """Chats of about so many words."""
    rng, vocabulary = random.Random(0), WORDS.split()
    with path.open("w") as file:
        for i in range(rows):
            asked, said = (" ".join(rng.choices(vocabulary, k=words // 2)) for _ in range(2))
            turns = [{"role": "user", "content": f"{i}: {asked} ?"}, {"role": "assistant", "content": f"{said} ."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def start(keys: dict[str, object], cache: Path) -> dict[str, object]:
    """One start, in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(keys)], capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, object] = json.loads(lines[0].removeprefix("MEASURED "))
    return found


def main() -> None:
    """Measure, show, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, object] = {"rows": given.rows, "words": given.words}
    with tempfile.TemporaryDirectory() as scratch:
        keys: dict[str, object] = {
            "model": given.model,
            "method": "pm",
            "max_length": 512,
            "max_test_samples": 8,
            "evaluate": "final",
            "fisher.samples": 8,
            "train.max_steps": 4,
            "train.per_device_train_batch_size": 2,
        }
        for name, rows in (("a hundredth", given.rows // 100), ("all", given.rows)):
            file = Path(scratch) / f"{rows}.jsonl"
            write(file, rows, given.words)
            for time in ("first", "second"):
                more = {"tasks": [{"data": str(file), "test_size": 0.01}], "output_dir": f"{scratch}/{rows}-{time}"}
                found[f"{name}, {time} start"] = start({**keys, **more}, Path(scratch) / "cache")
                if given.out:
                    given.out.write_text(json.dumps(found, indent=1) + "\n")
    show([{"start": key, **value} for key, value in found.items() if isinstance(value, dict)], None)


if __name__ == "__main__":
    main()
