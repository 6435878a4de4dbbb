# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether anybody has read a file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_IN_ACCESS = 0x1
_EVENT = struct.Struct("iIII")
"""``struct inotify_event``: watch, mask, cookie, and the length of a name, which a watched file has not."""
_ROOM = 1 << 16


class Reads:
    """Two signs of it. The time of the first access is kept by the file system, relatime included, and outlives the agent;
    a mount with noatime keeps none (mount(8)). inotify tells of each access, as long as the agent lives."""

    def __init__(self) -> None:
        self._inotify = -1
        self._watches: dict[Path, int] = {}
        self._told: set[int] = set()
        """Watches of files that were read; another file at a path has another watch."""

    def mark_unread(self, path: Path) -> None:
        """From now on ``was_read`` tells. Raises OSError."""
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
        with contextlib.suppress(OSError):  # no more watches are to be had
            self._watches[path] = self._watch(path)
        self._forget(path)

    def was_read(self, path: Path) -> bool:
        try:
            self._hear()
            return path.stat().st_atime_ns != 0 or self._watches.get(path) in self._told
        except OSError:
            return False

    def content(self, path: Path) -> bytes:
        """Without leaving a trace of it. Raises OSError."""
        was_read = self.was_read(path)
        fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            found = file.read()
        if not was_read:
            self._forget(path)
        return found

    def _watch(self, path: Path) -> int:
        """Raises OSError."""
        if self._inotify < 0:
            self._inotify = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        return _checked(_LIBC.inotify_add_watch(self._inotify, os.fsencode(path), _IN_ACCESS))

    def _forget(self, path: Path) -> None:
        self._hear()
        self._told -= {self._watches.get(path, -1)}

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._inotify >= 0:
                told = os.read(self._inotify, _ROOM)
                self._told.update(watch for watch, mask, _, _ in _EVENT.iter_unpack(told) if mask & _IN_ACCESS)

    def close(self) -> None:
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1


def _checked(result: int) -> int:
    """Raises OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
