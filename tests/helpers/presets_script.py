"""Run presets one after another, in every process of a launcher: MODEL FOLDER PRESET[:KIND]..."""

from __future__ import annotations

import sys
from pathlib import Path

from pm_llm.system.processes import process_state, shut_down
from tests.helpers.presets import sequence

if __name__ == "__main__":
    model, folder, *presets = sys.argv[1:]
    share = {"train.per_device_train_batch_size": 4 // process_state().num_processes}
    for preset in presets:
        name, _, kind = preset.partition(":")
        sequence(name, model, Path(folder) / preset, kind or "embedded", **share).run()
    shut_down()
