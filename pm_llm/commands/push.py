"""`pm-llm push`: upload an adapter with its card."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("push", help="upload a run's adapter with a model card to the Hub")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--base-model", metavar="USER/NAME", help="id of the base model, where the run's is a folder")
    parser.add_argument("--dry-run", action="store_true", help="show the card and list the files, upload nothing")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm push`: the adapter and its card."""
    from pm_llm.report.hub import push_run

    print(push_run(given.run_dir, given.repo_id, given.private, given.dry_run, given.base_model))
    return 0
