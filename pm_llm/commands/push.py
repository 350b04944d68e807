"""`pm-llm push`: upload an adapter with its card."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("push", help="upload a run's adapter, or an exported folder, to the Hub with a card")
    parser.add_argument("run_dir", metavar="RUN_OR_FOLDER")
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--base-model", metavar="USER/NAME", help="id of the base model, where the run's is a folder")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to, made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="show the card and list the files, upload nothing")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm push`: the adapter and its card."""
    from pm_llm.report.hub import Target, push

    target = Target(given.repo_id, given.private, given.dry_run, given.revision, given.create_pr)
    print(push(given.run_dir, target, given.base_model))
    return 0
