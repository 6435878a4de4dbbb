# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a crash leaves whole or absent, directories that only the agent may enter, and locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cpr_agent.errors import Busy

_CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20
"""Of a file that the agent has written for itself; the longest is the manifest of a VM with as many disks as can be."""
MAX_COMMAND_LINE_BYTES, MAX_WORDS = 2 << 20, 1 << 16
"""Of a process: as much as execve(2) takes by default, and more words than any QEMU has."""


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
def open_own(path: Path) -> Iterator[BinaryIO]:
    """A file of the agent's own, to be read. Raises OSError for whatever else has its name, and waits for none: one FIFO
    would keep the agent from all VMs."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        yield file


def read_own(path: Path) -> bytes:
    """Likewise, the whole of it. Raises OSError, also for a file that is longer than any that the agent writes."""
    with open_own(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_RECORD_BYTES:
            raise OSError(errno.EFBIG, "it is larger than any that the agent writes", str(path))
        return file.read(MAX_RECORD_BYTES)


def digest_of(file: BinaryIO, most: int) -> tuple[str, int]:
    """SHA-256 and number of the next bytes, at most so many: another process may go on to write."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(min(_CHUNK_BYTES, most - size)):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, at most until the process ends. Raises Busy if another process holds it."""
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

    ``owner`` (uid, gid) is set on the descriptor, so that no other user of the directory can redirect it. Not
    ``durable``, a reader sees the old or the new file as a whole, but after a crash there may be either, or none.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(data)
            os.fchmod(file.fileno(), mode)  # against the umask; before the owner changes, while that takes no capability
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
    """Rename ``path`` to keep it, in place of an older one of that name. Not yet durable."""
    aside = path.with_name(f"{path.name}.{suffix}")
    path.rename(aside)
    return aside


def command_line_of(pid: int) -> list[bytes]:
    """The words of a process's command line; none of one that has ended, or whose line is longer than any that a QEMU has:
    its length is the process's own choice (PR_SET_MM_MAP in prctl(2))."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            line = file.read(MAX_COMMAND_LINE_BYTES + 1)
    except OSError:
        return []
    if len(line) > MAX_COMMAND_LINE_BYTES or line.count(b"\0") > MAX_WORDS:
        return []
    return line.split(b"\0")[:-1]
