"""Pushing a run's merged adapter to the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from pm_llm.errors import PmLlmError, first_line
from pm_llm.methods import knows_task
from pm_llm.run_dir import STAGES, TASK_ADAPTER, RunDir

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def push_run(run_dir: str | Path, repo_id: str, private: bool = False, dry_run: bool = False) -> str:
    """Upload the merged adapter of a finished run with a model card; return what was done, in words.

    The token is the one `huggingface_hub` finds (HF_TOKEN or `hf auth login`); it is never printed. With `dry_run`
    nothing is sent: the card is written to `README.md` in the run's folder.

    Raises:
        PmLlmError: If the run is not finished or has no one adapter for all tasks, the name is no repository name, or
            the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from pm_llm.report.card import write_card

    run = RunDir.open(run_dir)
    results = run.results()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PmLlmError(f"{repo_id!r} is no repository name: {error}") from error
    if "/" not in repo_id:
        raise PmLlmError(f"{repo_id!r} names no user. Give user/name.")
    if knows_task(results["config"]["method"], results["method"]) and len(results["stages"]) > 1:
        raise PmLlmError(
            f"{run.path} has an adapter for each task, in {STAGES}/*/{TASK_ADAPTER}, and none for all of them: choose "
            "the ones to upload (`PeftModel.push_to_hub`), or run a method that ends in one adapter."
        )
    adapter = run.adapter
    config = json.loads((adapter / FILES[0]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in FILES[:2]:
            shutil.copy(adapter / name, folder / name)
        base_model, rank = results["config"]["model"], _rank(config)
        write_card(results, repo_id, base_model, rank, config.get("task_type"), folder / FILES[2])
        with run.locked():
            run.write(FILES[2], (folder / FILES[2]).read_bytes())
        sizes = ", ".join(f"{name} ({(folder / name).stat().st_size:,} bytes)" for name in FILES)
        if dry_run:
            return f"dry run: would upload to {repo_id}: {sizes}. The card is in {run.path / FILES[2]}."
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise PmLlmError(
                    f"{repo_id} exists and is public. Make it private on the Hub, or leave out --private."
                )
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Adapter after {len(results['stages'])} tasks"
            )
        except PmLlmError:
            raise
        except Exception as error:  # whatever the HTTP client of this huggingface_hub raises
            reason = first_line(error)
            raise PmLlmError(
                f"the Hub did not take {repo_id}: {reason}. Check the name and your login (`hf auth whoami`)."
            ) from error
    return f"uploaded {sizes} to {commit.repo_url}"


def _rank(config: dict) -> int:
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])
