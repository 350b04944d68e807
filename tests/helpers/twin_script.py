"""Run presets one after another on a device: DEVICE FOLDER MODEL PRESET[:KIND]... [-- KEY=VALUE...]

With DEVICE `twin` it prints one JSON line: by preset the reads that waited for the device, by the line that asked.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    device, folder, model, *words = sys.argv[1:]
    if device == "twin":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "twin"
        from transformers import training_args

        from tests.helpers.twin import counted

        training_args.is_torch_bf16_gpu_available = lambda: True  # transformers asks the devices it knows
    else:

        def counted() -> Any:
            return nullcontext({})

    from tests.helpers.presets import sequence

    at = words.index("--") if "--" in words else len(words)
    keys = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words[at + 1 :])}
    found = {}
    for preset in words[:at]:
        name, _, kind = preset.partition(":")
        with counted() as reads:
            sequence(name, model, Path(folder) / preset, kind or "embedded", **keys).run()
        found[preset] = reads
    print(json.dumps(found))
