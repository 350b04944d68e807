"""Files that survive a crash: written whole or not at all, known by their digest, guarded by a lock."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pm_llm.errors import PmLlmError, first_line

UNFINISHED = "unfinished"  # how the name of a folder ends that is being written
Digests = dict[str, dict[str, Any]]  # path relative to a folder -> {"size": bytes, "sha256": hex}


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, whenever the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link there would be followed
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_link(path: Path, target: Path) -> None:
    """Let the symbolic link `path` point to `target`, at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(path)
    sync(path.parent)


def rename_tree(temporary: Path, final: Path) -> None:
    """Flush a folder with all it holds, let others read it as the umask says, then give it its name."""
    readable(temporary)
    for folder, _, names in os.walk(temporary):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    temporary.rename(final)
    sync(final.parent)


def readable(folder: Path, *names: str) -> None:
    """Files of a folder (by default all below it, and folders) may be read by whom the umask lets: safetensors and
    mkdtemp make them the owner's."""
    mask = os.umask(0)
    os.umask(mask)
    if names:
        for name in names:
            os.chmod(folder / name, 0o666 & ~mask)
        return
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o777 & ~mask)
        for name in files:
            if not (Path(place) / name).is_symlink():
                os.chmod(Path(place) / name, 0o666 & ~mask)


def remove_tree(path: Path) -> None:
    """Take a folder's name away, then what it holds: under that name it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():  # left by a removal that was killed
        shutil.rmtree(temporary)
    shutil.rmtree(path.rename(temporary))


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    """The SHA-256 of a JSON-like value, in hex; keys in any order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_of_list(values: Iterable[Any], *more: Any) -> str:
    """`sha256_of([list(values), *more])`, of which no more is held than one value."""
    found = hashlib.sha256(b"[[")
    for i, value in enumerate(values):
        found.update(b", " * bool(i) + json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
    found.update(b"]")
    for value in more:
        found.update(b", " + json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
    found.update(b"]")
    return found.hexdigest()


def digests(folder: Path, paths: Iterable[Path] | None = None) -> Digests:
    """Size and SHA-256 of files below `folder` (by default all), by their relative path."""
    files = (path for path in folder.rglob("*") if path.is_file()) if paths is None else paths
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(files)
    }


def damaged(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Relative path -> what is wrong with it, of the files that are not as `expected`."""
    found = {}
    for name, known in expected.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != known["size"]:
                found[name] = f"has {size} bytes instead of {known['size']}"
            elif sha256(path) != known["sha256"]:
                found[name] = "has other content than was written"
        except FileNotFoundError:
            found[name] = "is missing"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
    return found


@contextmanager
def writing(where: str | Path, leftover: Path | None = None) -> Iterator[None]:
    """Around the writing of files: an error that the disk gives becomes one clear line, and `leftover` is removed.

    Libraries report a full disk in their own ways: safetensors as SafetensorError, torch.save as RuntimeError,
    tokenizers as a bare Exception.

    Raises:
        PmLlmError: If something could not be written.
    """
    try:
        yield
    except PmLlmError:
        raise
    except Exception as error:
        said_so = isinstance(error, (OSError, SafetensorError, RuntimeError)) or type(error) is Exception
        if not said_so or _is_of_devices(error):
            raise
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise PmLlmError(
            f"cannot write to {where}: {reason}. What was there before is untouched. Make room, give permission or "
            "choose another output_dir; then run the same command again."
        ) from error


def _is_of_devices(error: Exception) -> bool:
    """Whether an accelerator or another process said it, as while a checkpoint's weights are gathered."""
    import torch

    from pm_llm.system.processes import is_lost_connection

    broken = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))
    return isinstance(error, broken) or is_lost_connection(error)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that is renamed to `out` when the block is done, and is gone if it fails.

    Raises:
        PmLlmError: If `out` exists or cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise PmLlmError(f"{out} exists. Choose another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.{UNFINISHED}"):  # by a process that was killed
            if not left.is_symlink() and not _alive(left):
                shutil.rmtree(left)
        suffix = f".{os.getpid()}.{UNFINISHED}"
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=suffix, dir=out.parent))
        try:
            yield scratch
            readable(scratch)
            scratch.rename(out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise PmLlmError(f"cannot write {out}: {reason}. Choose another --out.") from error


def _alive(scratch: Path) -> bool:
    """Whether the process that a scratch folder's name tells of is at work still (on this machine)."""
    number = scratch.name.removesuffix(f".{UNFINISHED}").rpartition(".")[2]
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def size_of(n: float) -> str:
    """Bytes as one reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A line a row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
