# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of Unix sockets at which a QEMU listens, while another one that would take them over is tried.

A QEMU that starts binds its sockets anew by their paths, and whoever listened there before is not reached any more, also
once the new one is gone: a guest would be without its guest agent's socket. So they have another name meanwhile, with the
PID of their owner. Not a second one: a hard link to another user's socket wants CAP_FOWNER.

Paths are those of the VM's command line, but their directories belong to users who may put there what they like. So each
directory is opened once, and only sockets of the QEMU's own user get another name, or are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from cpr_agent.handles import directory_at, refuse_other_than_socket, uid_of

MAX_ENTRIES = 4096
"""Of a directory that are looked at: its owner may have filled it."""
_KEPT = re.compile(r"(?P<name>.+)\.of-\d+")


def keep(paths: Iterable[str], pid: int) -> None:
    """Where that can't be, nothing is kept."""
    for directory, name, uid in _places(paths, pid):
        with contextlib.suppress(OSError):
            _rename(directory, name, _kept(name, pid), uid)


def settle(paths: Iterable[str], pid: int) -> None:
    """The VM's QEMU is now the one with this PID: what was kept for it is its own again, and nothing else is kept."""
    for directory, name, uid in _places(paths, pid):
        with contextlib.suppress(OSError):
            _rename(directory, _kept(name, pid), name, uid)
        with os.scandir(directory) as entries:
            kept = [entry.name for entry in islice(entries, MAX_ENTRIES) if entry.name.startswith(f"{name}.of-")]
        for other in kept:
            match = _KEPT.fullmatch(other)
            if match and match["name"] == name:
                with contextlib.suppress(OSError):
                    _refuse_others(directory, other, uid)
                    os.unlink(other, dir_fd=directory)


def _places(paths: Iterable[str], pid: int) -> Iterator[tuple[int, str, int]]:
    """Directory, name there, and the user of the QEMU whose socket it is; what can't be opened is left out."""
    for path in map(Path, paths):
        with contextlib.suppress(OSError), directory_at(path.parent) as directory:
            yield directory, path.name, uid_of(pid)


def _rename(directory: int, old: str, new: str, uid: int) -> None:
    """Raises OSError, also if either name is there and no socket of this user."""
    _refuse_others(directory, old, uid)
    with contextlib.suppress(FileNotFoundError):
        _refuse_others(directory, new, uid)
    os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def _refuse_others(directory: int, name: str, uid: int) -> None:
    refuse_other_than_socket(os.stat(name, dir_fd=directory, follow_symlinks=False), name, uid)


def _kept(name: str, pid: int) -> str:
    return f"{name}.of-{pid}"
