"""Writes that are either there as a whole after a crash, or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpr_agent.errors import Busy


def sync_directory(path: Path) -> None:
    """Make renames and unlinks in ``path`` durable (fsync(2), "Calling fsync() does not necessarily ...")."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private_directory(path: Path) -> None:
    """Create ``path`` and its parents, 0700 where new, durable in its parent."""
    if path.is_dir():
        return
    make_private_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that ``path`` is; it ends with the process at the latest. Raises Busy if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(
            f"another agent has {path.parent}", left="nothing was started", remedy="stop the other agent: see fuser(1)"
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def write_atomically(
    path: Path, data: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None, *, durable: bool = True
) -> None:
    """Replace ``path`` with ``data``: temporary name, fsync, rename, fsync of the directory. Raises OSError.

    ``owner`` (uid, gid) is set on the descriptor, so that nobody who may write to the directory can redirect it. Without
    ``durable`` a reader sees the old or the new as a whole, but a crash can leave either, or nothing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(data)
            os.fchmod(file.fileno(), mode)  # whatever the umask; while the file is ours, which needs no capability
            if owner:
                os.fchown(file.fileno(), *owner)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def rename_aside(path: Path, suffix: str) -> Path:
    """Move ``path`` out of the way, keeping it; an older one of the same name is replaced. Not yet durable."""
    aside = path.with_name(f"{path.name}.{suffix}")
    path.rename(aside)
    return aside
