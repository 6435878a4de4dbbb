"""The names of Unix sockets at which a QEMU listens, while another one that would take them over is tried.

A QEMU that starts binds its sockets anew by their paths, and whoever listened there before is not reached any more, also
once the new one is gone: a guest would be without its guest agent's socket. So they have another name meanwhile, with the
PID of their owner. Not a second one: a hard link to another user's socket wants CAP_FOWNER.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable
from pathlib import Path


def keep(paths: Iterable[str], pid: int) -> None:
    """Where that can't be, nothing is kept."""
    for path in map(Path, paths):
        with contextlib.suppress(OSError):
            path.rename(_kept(path, pid))


def settle(paths: Iterable[str], pid: int) -> None:
    """The VM's QEMU is now the one with this PID: what was kept for it is its own again, and nothing else is kept."""
    for path in map(Path, paths):
        with contextlib.suppress(OSError):
            if _kept(path, pid).exists():
                _kept(path, pid).replace(path)
            for kept in path.parent.glob(f"{glob.escape(path.name)}.of-*"):
                kept.unlink()


def _kept(path: Path, pid: int) -> Path:
    return path.with_name(f"{path.name}.of-{pid}")
