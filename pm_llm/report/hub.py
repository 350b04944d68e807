"""Pushing a run's merged adapter to the Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.run.folder import RunDir
from pm_llm.run.reading import STAGES, TASK_ADAPTER
from pm_llm.run.record import Results
from pm_llm.system.files import replace_bytes, sha256_of

WRITTEN = ".card"  # in the run's folder: the digest of the card as it was written
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def push_run(
    run_dir: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload the merged adapter of a finished run with a model card; return what was done, in words.

    The token is the one `huggingface_hub` finds (HF_TOKEN or `hf auth login`); it is never printed. With `dry_run`
    nothing is sent and nothing is written: the card is part of what is returned. Of a card that is on the Hub, or that
    the user has edited in the run's folder (which goes first), all is kept that a run does not say.

    Args:
        run_dir: The run.
        repo_id: The repository, `user/name`.
        private: Whether to make it private.
        dry_run: Whether to send nothing.
        base_model: The base model's id on the Hub; needed where the run's base is a folder of this machine, whose path
            is never uploaded.

    Raises:
        PmLlmError: If the run is not finished or has no one adapter for all tasks, the name is no repository name, or
            the Hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard

    from pm_llm.report.card import write_card

    run = RunDir.open(run_dir)
    results = run.results()
    check_repository(repo_id)
    if results.facts.knows_task and len(results.stages) > 1:
        raise PmLlmError(
            f"{run.path} has an adapter for each task, in {STAGES}/*/{TASK_ADAPTER}, and none for all of them: choose "
            "the ones to upload (`PeftModel.push_to_hub`), or run a method that ends in one adapter."
        )
    adapter = run.adapter
    config = json.loads((adapter / FILES[0]).read_text())
    base = _base_of(config, results, base_model)
    config["base_model_name_or_path"], api = base, HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copy(adapter / FILES[1], folder / FILES[1])
        (folder / FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True))
        with _told(repo_id):
            theirs = _card_of(run) if dry_run else _card_of(run) or _card_on_hub(api, repo_id)
        card = write_card(results, repo_id, base, _rank(config), config.get("task_type"), folder / FILES[2], theirs)
        sizes = ", ".join(f"{name} ({(folder / name).stat().st_size:,} bytes)" for name in FILES)
        if dry_run:
            return f"{card}\ndry run: would upload to {repo_id}: {sizes}. Above is the card."
        with _told(repo_id):
            ModelCard(card).validate()  # before there is a repository
            commit = _upload(api, repo_id, folder, private, f"Adapter after {len(results.stages)} tasks")
        _keep(run, card)
    return f"uploaded {sizes} to {commit.repo_url}"


def check_repository(repo_id: str) -> None:
    """Raise PmLlmError unless it can name a repository, `user/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PmLlmError(f"{repo_id!r} is no repository name: {error}") from error
    if "/" not in repo_id:
        raise PmLlmError(f"{repo_id!r} names no user. Give user/name.")


def _base_of(config: dict[str, Any], results: Results, given: str | None) -> str:
    """The id on the Hub of an adapter's base model. Raises PmLlmError if it is not known."""
    base = str(given or config.get("base_model_name_or_path") or results.config["model"])
    if not is_hub_id(base) or (given is None and Path(base).exists()):
        raise PmLlmError(
            f"the base model is {base!r}, a folder of this machine, which nobody else can load. Name its id on the "
            "Hub with --base-model USER/NAME."
        )
    return base


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be an id on the Hub."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def _keep(run: RunDir, card: str) -> None:
    """The card in the run's folder, the user's to edit from here on."""
    with run.locked():
        replace_bytes(run.path / FILES[2], card.encode())
        replace_bytes(run.path / WRITTEN, sha256_of(card).encode())


def _upload(api: Any, repo_id: str, folder: Path, private: bool, message: str) -> Any:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise PmLlmError(f"{repo_id} exists and is public. Make it private on the Hub, or leave out --private.")
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """What the Hub says against something, whole and in one line."""
    try:
        yield
    except PmLlmError:
        raise
    except Exception as error:  # whatever the HTTP client of this huggingface_hub raises
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise PmLlmError(
            f"the Hub did not take {repo_id}: {reason}. Check the name and your login (`hf auth whoami`)."
        ) from error


def _card_of(run: RunDir) -> str | None:
    """The card in the run's folder, if the user has edited it since it was written."""
    card, written = run.path / FILES[2], run.path / WRITTEN
    if not card.is_file() or card.is_symlink():
        return None
    text = card.read_text(encoding="utf-8")
    return None if written.is_file() and written.read_text() == sha256_of(text) else text


def _card_on_hub(api: Any, repo_id: str) -> str | None:
    """The card that is there; None where there is none. Anything else that keeps it from being read is raised: a card
    that was not seen would be overwritten."""
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, FILES[2], force_download=True)).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return None


def _rank(config: dict[str, Any]) -> int:
    found: int = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return found
