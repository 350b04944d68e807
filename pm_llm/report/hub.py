"""Pushing a run's merged adapter to the Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pm_llm.adapters.untrusted import check_files
from pm_llm.errors import PmLlmError
from pm_llm.report.gate import refuse_failed
from pm_llm.run.folder import RunDir
from pm_llm.run.reading import STAGES, TASK_ADAPTER
from pm_llm.system.files import replace_bytes, sha256_of

WRITTEN = ".card"  # in the run's folder: the digest of the card as it was written
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
WHAT = {"adapter_config.json": "peft", "config.json": "transformers", "adapter.gguf": "llama.cpp"}  # file -> library


@dataclass(frozen=True)
class Target:
    """Where to: the repository `user/name`, whether to make it private, a branch of it (made if it is not there), or a
    pull request; with `dry_run` nothing is sent."""

    repo_id: str
    private: bool = False
    dry_run: bool = False
    revision: str | None = None
    create_pr: bool = False

    def check(self) -> None:
        """Raise PmLlmError unless there can be such a place."""
        check_repository(self.repo_id)
        if self.revision is not None and not re.fullmatch(r"\w[\w./-]*", self.revision):
            raise PmLlmError(f"--revision {self.revision!r} is no name of a branch. Use letters, digits and . / - _.")

    def __str__(self) -> str:
        branch = f" ({self.revision})" if self.revision else ""
        return f"{self.repo_id}{branch}{' as a pull request' if self.create_pr else ''}"


def push(path: str | Path, target: Target, base_model: str | None = None) -> str:
    """Upload a run's adapter, or a folder that `merge`, `remove`, `export` or `compress --expand` wrote; return what
    was done, in words. Raises PmLlmError as :func:`push_run` and :func:`push_folder`."""
    folder = Path(path)
    is_run = RunDir(folder).has_state() or not any((folder / name).is_file() for name in WHAT)
    return (push_run if is_run else push_folder)(folder, target, base_model)


def push_folder(folder: Path, target: Target, base_model: str | None = None) -> str:
    """Upload a folder as it is, with a card: its own, or one that names the base model.

    Raises:
        PmLlmError: If the folder's base model is not known by its id, the name is no repository name, or the Hub
            refuses.
    """
    from huggingface_hub import HfApi, ModelCardData

    target.check()
    kind = next(name for name in WHAT if (folder / name).is_file())
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    config = json.loads((folder / FILES[0]).read_text(encoding="utf-8")) if kind == FILES[0] else {}
    base = _base_of(config, base_model)
    if kind == FILES[0]:
        check_files(folder)
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch, _told(target.repo_id):
        out = Path(scratch)
        for name in files:
            shutil.copy(folder / name, out / name)
        if config:
            (out / FILES[0]).write_text(json.dumps({**config, "base_model_name_or_path": base}, indent=2))
        theirs = (folder / FILES[2]).read_text(encoding="utf-8") if FILES[2] in files else None
        card = theirs if theirs or target.dry_run else _card_on_hub(api, target)
        if card is None:
            data = ModelCardData(base_model=base, library_name=WHAT[kind], tags=["pm_llm"])
            title = target.repo_id.rpartition("/")[2]
            card = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nMade by pm_llm from `{base}`.\n"
        (out / FILES[2]).write_text(card, encoding="utf-8")
        return _send(api, target, out, card, "Uploaded by pm_llm")


def _kept(run: RunDir) -> str:
    """What became of earlier tasks and of the base's abilities, as a table; empty where there is nothing of it."""
    from pm_llm.report.card import shown_name
    from pm_llm.report.changes import kept_table
    from pm_llm.report.data import open_run

    return kept_table([one.renamed(shown_name) for one in open_run(run.path).changes])


def push_run(run_dir: str | Path, target: Target, base_model: str | None = None) -> str:
    """Upload the merged adapter of a finished run with a model card; return what was done, in words.

    The token is the one `huggingface_hub` finds (HF_TOKEN or `hf auth login`); it is never printed. With `dry_run`
    nothing is sent and nothing is written: the card is part of what is returned. Of a card that is on the Hub, or that
    the user has edited in the run's folder (which goes first), all is kept that a run does not say.

    Args:
        run_dir: The run.
        target: Where to.
        base_model: The base model's id on the Hub; needed where the run's base is a folder of this machine, whose path
            is never uploaded.

    Raises:
        PmLlmError: If the run is not finished or has no one adapter for all tasks, the name is no repository name, or
            the Hub refuses.
    """
    from huggingface_hub import HfApi

    from pm_llm.report.card import write_card

    run, repo_id = RunDir.open(run_dir), target.repo_id
    results = run.results()
    target.check()
    refuse_failed(run)
    if results.facts.knows_task and len(results.stages) > 1:
        raise PmLlmError(
            f"{run.path} has an adapter for each task, in {STAGES}/*/{TASK_ADAPTER}, and none for all of them: choose "
            "the ones to upload (`PeftModel.push_to_hub`), or run a method that ends in one adapter."
        )
    adapter = run.adapter
    config = json.loads((adapter / FILES[0]).read_text())
    base = _base_of({"base_model_name_or_path": results.config["model"], **config}, base_model)
    config["base_model_name_or_path"], api = base, HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copy(adapter / FILES[1], folder / FILES[1])
        (folder / FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True))
        with _told(repo_id):
            theirs = _card_of(run) if target.dry_run else _card_of(run) or _card_on_hub(api, target)
        task_type, rank, kept = config.get("task_type"), _rank(config), _kept(run)
        card = write_card(results, repo_id, base, rank, task_type, folder / FILES[2], theirs, kept)
        with _told(repo_id):
            said = _send(api, target, folder, card, f"Adapter after {len(results.stages)} tasks")
    if not target.dry_run:
        _keep(run, card)
    return said


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


def _base_of(config: dict[str, Any], given: str | None) -> str:
    """The id on the Hub of an adapter's base model. Raises PmLlmError if it is not known."""
    base = str(given or config.get("base_model_name_or_path") or "")
    if not base:
        raise PmLlmError("the base model is not named in that folder. Name its id with --base-model USER/NAME.")
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


def _send(api: Any, target: Target, folder: Path, card: str, message: str) -> str:
    """Upload a folder with its card, or say what would be; what was done, in words."""
    from huggingface_hub import ModelCard

    sizes = ", ".join(f"{p.name} ({p.stat().st_size:,} bytes)" for p in sorted(folder.iterdir(), key=_order))
    if target.dry_run:
        return f"{card}\ndry run: would upload to {target}: {sizes}. Above is the card."
    ModelCard(card).validate()  # before there is a repository
    commit = _upload(api, target, folder, message)
    return f"uploaded {sizes} to {commit.pr_url or commit.repo_url}"


def _order(file: Path) -> tuple[bool, str]:
    return file.name == FILES[2], file.name  # the card comes last


def _upload(api: Any, target: Target, folder: Path, message: str) -> Any:
    repo_id = target.repo_id
    api.create_repo(repo_id, private=target.private, exist_ok=True)
    if target.private and not api.repo_info(repo_id).private:
        raise PmLlmError(f"{repo_id} exists and is public. Make it private on the Hub, or leave out --private.")
    if target.revision is not None and target.revision != "main":
        api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        revision=target.revision,
        create_pr=target.create_pr or None,
    )


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


def _card_on_hub(api: Any, target: Target) -> str | None:
    """The card that is there; None where there is none. Anything else that keeps it from being read is raised: a card
    that was not seen would be overwritten."""
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    where = {"revision": target.revision, "force_download": True}
    try:
        return Path(api.hf_hub_download(target.repo_id, FILES[2], **where)).read_text(encoding="utf-8")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _rank(config: dict[str, Any]) -> int:
    found: int = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return found
