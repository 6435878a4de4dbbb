# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that others may change: opened once, looked at through the descriptor, and used by it.

A VM's user owns the directory of its sockets, and may put a link in the place of any of them. Root must not follow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_PEER = struct.Struct("iII")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_LINKS = 8


class NotOursError(OSError):
    """A name that leads to something else than it should."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


@contextlib.contextmanager
def socket_at(path: Path, uid: int) -> Iterator[str]:
    """An address by which to connect to the socket that is at ``path`` now, whatever comes there meanwhile. Raises
    NotOursError if it is no socket, or not of user ``uid``; OSError."""
    fd = os.open(path, _LOOK)
    try:
        refuse_other_than_socket(os.fstat(fd), path, uid)
        yield f"/proc/self/fd/{fd}"  # connect(2) follows this one link to the inode itself
    finally:
        os.close(fd)


def refuse_other_than_socket(info: os.stat_result, path: str | Path, uid: int) -> None:
    """Raises NotOursError."""
    if not stat.S_ISSOCK(info.st_mode):
        raise NotOursError(path, "it is not a socket")
    if info.st_uid != uid:
        raise NotOursError(path, f"it belongs to user {info.st_uid}, not {uid}")


@contextlib.contextmanager
def directory_at(path: Path) -> Iterator[int]:
    """A descriptor of the directory ``path``. A symbolic link on the way is followed only where none but root and the
    agent's own user could have put it. Raises NotOursError, OSError."""
    fd = _walk(path)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)
    try:
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def file_at(path: Path) -> Iterator[BinaryIO]:
    """The regular file at ``path``, to be read; links are followed likewise, and a FIFO or a device is not waited for.
    Raises NotOursError, OSError."""
    fd = _walk(path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotOursError(path, "it is not a regular file")
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(fd)
    with open(readable, "rb") as file:  # noqa: PTH123 - a descriptor
        yield file


def _walk(path: Path, links: int = 0) -> int:
    """A descriptor of what is at ``path``, good for looking at it alone (O_PATH in open(2))."""
    if not path.is_absolute() or links > MAX_LINKS:
        raise NotOursError(path, "it is no absolute path" if not path.is_absolute() else "it has too many symbolic links")
    here = os.open("/", _LOOK | os.O_DIRECTORY)
    try:
        for position, name in enumerate(path.parts[1:], 1):
            below = os.open(name, _LOOK, dir_fd=here)
            if stat.S_ISLNK(os.fstat(below).st_mode):
                trusted = _only_ours(os.fstat(here))
                target = os.readlink("", dir_fd=below)
                os.close(below)
                if not trusted:
                    raise NotOursError(path, f"{name!r} on the way is a symbolic link that others may change")
                return _walk(Path(*path.parts[:position]) / target / Path(*path.parts[position + 1 :]), links + 1)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here


def _only_ours(info: os.stat_result) -> bool:
    """Whether none but root and the agent's own user may change what is in this directory."""
    return info.st_uid in (0, os.geteuid()) and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def uid_of(pid: int) -> int:
    """The user whose files this process makes (proc(5), the last of "Uid:"). Raises OSError if there is no such process.

    The file has the process's own name in it, which may be any bytes."""
    for line in Path(f"/proc/{pid}/status").read_bytes().split(b"\n"):
        if line.startswith(b"Uid:"):
            return int(line.split()[-1])
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), str(pid))


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket: who has connected or, for a client, who has listened."""

    pid: int
    uid: int
    gid: int


def peer_of(endpoint: socket.socket) -> Peer:
    """Raises OSError."""
    return Peer(*_PEER.unpack(endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)))
