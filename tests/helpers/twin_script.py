"""Run presets one after another on a device: DEVICE FOLDER MODEL PRESET[:KIND]... [-- key=value...]

With DEVICE `twin` it prints one JSON line: by preset the reads that waited for the device, by the line that asked.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    device, folder, model, *words = sys.argv[1:]
    if device == "twin":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "twin"
        from tests.helpers.twin import counted
    else:

        def counted() -> Any:
            return nullcontext({})

    from tests.helpers.presets import sequence

    at = words.index("--") if "--" in words else len(words)
    keys = dict(word.split("=", 1) for word in words[at + 1 :])
    found = {}
    for preset in words[:at]:
        name, _, kind = preset.partition(":")
        with counted() as reads:
            sequence(name, model, Path(folder) / preset, kind or "embedded", **keys).run()
        found[preset] = reads
    print(json.dumps(found))
