"""`pm-llm ARGUMENTS` on the second device of :mod:`tests.helpers.twin`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "twin"
    from pm_llm.cli import main
    from tests.helpers import twin

    assert twin.Backend.is_available()
    if status := main(sys.argv[1:]):
        sys.exit(status)
