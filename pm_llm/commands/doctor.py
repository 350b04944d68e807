"""`pm-llm doctor`: what of this machine will not work."""

from __future__ import annotations

import argparse
from typing import Any

from pm_llm.commands.keys import add_keys, config_of


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "doctor",
        help="say what of this machine will not work, and what to install",
        description="Check versions, devices, bfloat16, disk and the Hub login, for the run that the configuration "
        "describes. Further flags are keys of the configuration, as for run. Exit status 1 if a run would fail.",
    )
    add_keys(parser)
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm doctor`: a line for each thing that was looked at."""
    from pm_llm.commands._examine import main_text

    config = config_of(given)
    text, status = main_text(config)
    print(text)
    return status
