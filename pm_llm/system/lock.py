"""A lock on a folder, held by a process."""

from __future__ import annotations

import errno
import os
import platform
import stat
import time
from pathlib import Path
from typing import Any, ClassVar

from pm_llm.errors import PmLlmError

try:
    import fcntl
except ImportError as error:  # Windows
    raise PmLlmError(
        "a run's folder is locked with POSIX locks, which this platform lacks. Use Linux or macOS; on Windows, WSL."
    ) from error


def try_lock(file: Any) -> None:
    """Lock an open file until it is closed. Raises OSError if another has it, or the file system has no locks."""
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """One process at a time in a folder; the kernel lets go of the lock when its holder dies, so none is ever stale.

    A POSIX lock: unlike BSD's `flock`, it is not inherited by forked data-loader workers, and it holds over NFS. It is
    the process's, not the object's, and any closing of the file would end it: so locks held are noted in `_held`.

    Args:
        folder: The folder; the lock is its file `.lock`, which says who holds it.
    """

    _held: ClassVar[dict[Path, int]] = {}  # lock file -> the process that has noted it: a fork inherits the note

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: Any = None

    def acquire(self) -> None:
        """Take the lock. Raises PmLlmError if another process has it, or this one already."""
        if self._is_ours():
            raise PmLlmError(f"{self.path.parent} is in use by this process already.")
        file = self._opened()
        for patience in (0.1, 0.2, 0.4, 0):  # one that only looks who is at work lets go at once
            try:
                try_lock(file)
                if not self._lock_folder():
                    raise BlockingIOError
                break
            except (BlockingIOError, PermissionError) as error:
                if patience:
                    time.sleep(patience)
                    continue
                file.seek(0)
                holder = file.read().strip() or "a process that has not said its name"
                file.close()
                os.close(self._folder)
                raise PmLlmError(
                    f"{self.path.parent} is in use by {holder}. Wait for it, stop it, or choose another output_dir."
                ) from error
        self._held[self.path.resolve()] = os.getpid()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._file = file

    def _opened(self) -> Any:
        """The lock file, and the folder itself, which is locked too: a lock file that is removed lets nobody in."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise PmLlmError(f"{self.path} is no ordinary file. Remove it, or choose another output_dir.")
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise PmLlmError(f"{self.path} is a link. Remove it, or choose another output_dir.") from error
        self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        return os.fdopen(handle, "r+", encoding="utf-8")

    def _lock_folder(self) -> bool:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system that has no locks on folders: the lock file is all there is
            return True
        return True

    def release(self, remove: bool = False) -> None:
        """Let go, and `remove` the file."""
        if self._file is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            self._file.close()
            os.close(self._folder)
            self._file = None
            self._held.pop(self.path.resolve(), None)

    def _is_ours(self) -> bool:
        return self._held.get(self.path.resolve()) == os.getpid()

    def holder(self) -> str | None:
        """Who has the lock now; None if nobody."""
        if self._is_ours():
            return f"process {os.getpid()} on {platform.node()}"
        try:
            with self.path.open("r+", encoding="utf-8") as file:
                try:
                    try_lock(file)
                except (BlockingIOError, PermissionError):
                    return file.read().strip() or "another process"
        except OSError:
            pass  # no lock file, none of ours, a file system to be read only: nobody that could be named
        return None
