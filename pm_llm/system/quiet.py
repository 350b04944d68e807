"""The libraries' own bars and notices; none of them is imported before it is wanted."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


def quiet_notices() -> None:
    """Silence notices that do not concern what the user does. Call it before the libraries are imported."""
    # everyone is told that an optional package for 4 bits on some CPUs is not there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # an argument's new name in transformers 5.20, which its older versions do not know
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours; warnings stay."""
    quiet_notices()
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def silence() -> Iterator[None]:
    """Whatever is printed meanwhile goes nowhere."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
