"""`pm-llm merge`: one fold between adapter folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pm_llm.accumulators import mapped_files
from pm_llm.errors import PmLlmError
from pm_llm.merges import FoldReport, Merger


def merge_folders(
    running: str | Path, new: str | Path, coefficient: float, max_rank: int | None, out: str | Path
) -> FoldReport:
    """Write `running + coefficient * new` as an adapter folder `out`, truncated to `max_rank` if given.

    Raises:
        PmLlmError: If an input is no foldable adapter, they do not belong together, or `out` exists or cannot be
            written. Then `out` is not there.
    """
    out = Path(out)
    if out.exists():
        raise PmLlmError(f"{out} exists. Choose another --out.")
    merger = Merger("constant", max_rank=max_rank, coefficient=coefficient)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            # module by module, from mapped files into mapped files: memory holds a few modules
            merger.fold(running, new, zeros=mapped_files(scratch)).save(scratch)
            scratch.chmod(0o755)
            scratch.rename(out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        raise PmLlmError(f"cannot write {out}: {error.strerror}. Choose another --out.") from error
    return merger.report
