# SPDX-License-Identifier: GPL-2.0-or-later
"""Room on the disk for the journal when all other room is taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

RESERVE_BYTES = 256 << 10
"""The undo of an upgrade of 100 guests writes some 80 KB."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """A file that takes up room, and is removed when a record finds none: else a disk that is full would keep guests
    stopped whose save is taken back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._there = False

    def take(self) -> None:
        """If it is not there, and there is room."""
        if self._there:
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
            self._there = True
        except OSError:
            self._remove()

    def gives_way_to(self, error: OSError) -> bool:
        """Whether there is room now that was lacking."""
        return error.errno in _FULL and self._remove()

    def _remove(self) -> bool:
        there, self._there = self._there, False
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            return False
        return there
