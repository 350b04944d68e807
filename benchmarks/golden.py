"""What every preset leaves, as digests: run before and after a change that is to change nothing, on one machine.

    python benchmarks/golden.py --out before.json
    python benchmarks/golden.py --out after.json --compare before.json

Each preset trains two tasks of the embedded LLaMA and T5 for a few steps on one thread. Digests are of the adapters,
the coefficients, the matrix and what the merge and the constraints remember (by values, whatever their names).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from pm_llm.cli import main as pm_llm
from pm_llm.presets import PRESETS

KEYS = {"benchmark": "embedded", "order": "sentiment,topic", "max_train_samples": 16, "max_test_samples": 4}
KEYS |= {"train.max_steps": 3, "train.learning_rate": 0.01, "train.per_device_train_batch_size": 4, "lora.r": 4}
# constraints that would sleep through three steps
AWAKE = {"pam": "{name: align, every: 1}", "lori": "{name: lori, calibration: 0.6}"}
AWAKE |= {"coso": "{name: gradient_subspace, size: 2}"}
KEYS |= {"fisher.samples": 4, "max_length": 96, "train.logging_steps": 1}


def of_tensors(file: Path) -> str:
    """A digest of a file's tensors that does not look at their names."""
    found = [
        hashlib.sha256(
            f"{tuple(x.shape)}".encode() + x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for x in load_file(file).values()
        if x.numel()
    ]
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]


def of_run(folder: Path) -> dict[str, object]:
    """Digests of the tensors of each stage, and the numbers of the run."""
    results = json.loads((folder / "results.json").read_text())
    files = sorted((folder / "stages").rglob("*.safetensors"))
    found: dict[str, object] = {str(file.relative_to(folder)): of_tensors(file) for file in files}
    return found | {key: results[key] for key in ("matrix", "coefficients", "raw_coefficients", "truncation_errors")}


def run(family: str, preset: str, folder: Path) -> dict[str, object]:
    """One preset on one family; what it says where it is refused."""
    argv = ["run", "--model", f"embedded:{family}", "--method", preset, "--output_dir", str(folder)]
    argv += [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]
    argv += ["--constrain", AWAKE[preset]] if preset in AWAKE else []
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = pm_llm(argv)
    finally:
        sys.stdout.close()
        sys.stdout = sys.__stdout__
    return of_run(folder) if status == 0 else {"status": status}


def main() -> int:
    """Write the digests; with `--compare` also say what differs, and fail if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--families", nargs="+", default=["llama", "t5"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for family in given.families:
            for preset in given.presets:
                found[f"{family} {preset}"] = run(family, preset, Path(scratch) / family / preset)
                print(f"{family} {preset}: {'' if 'matrix' in found[f'{family} {preset}'] else 'refused'}", flush=True)
    given.out.write_text(json.dumps(found, indent=1))
    if given.compare is None:
        return 0
    before = json.loads(given.compare.read_text())
    found = json.loads(given.out.read_text())
    wrong = {
        name: [key for key in before[name] | one if before[name].get(key) != one.get(key)]
        for name, one in found.items()
        if before.get(name) != one
    }
    for name, keys in wrong.items():
        print(f"differs: {name}: {', '.join(keys)}")
    print(f"{len(found) - len(wrong)} of {len(found)} are the same")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
