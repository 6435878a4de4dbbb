# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of the firmware that a guest was started with, for as long as it runs; implements core.ports.Firmware.

A package's upgrade or removal takes a firmware file away from under its guest. Its next QEMU could not start without it, or
would refuse a state whose ROMs have another size.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cpr_agent.core.model import Firmware, KeptFile
from cpr_agent.files import read_own, sync_directory, write_atomically
from cpr_agent.handles import file_at

INDEX = "index.json"
CONTENTS = ".contents"
ROM_SUFFIXES = (".bin", ".rom")
ROM_BYTES = 1 << 20
"""A ROM that QEMU looks for by itself is smaller: firmware of megabytes is named by the command line."""
FILE_BYTES = 64 << 20
"""No firmware comes near (QEMU takes flash of 64 MiB at the most, hw/block/pflash_cfi01.c)."""
_READ = msgspec.json.Decoder(list[KeptFile])
"""Made once, as in store/schema.py."""


class KeptFirmware:
    """``root`` has a directory for each VM: an index, ``files`` by their digests, and ``roms`` by their names. They are
    links to contents that all VMs share, so that many guests cost no more than one. Any user may read them, and root alone
    may write."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        """Held while contents come and go, never while a file of others is read."""

    def keep(self, vm: str, wanted: Firmware) -> None:
        draft, kept = self._root / f".{vm}.draft", self._root / vm
        for made in (self._root.parent, self._root, self._root / CONTENTS):
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o755)
        shutil.rmtree(draft, ignore_errors=True)
        for made in (draft, draft / "files", draft / "roms"):
            made.mkdir(mode=0o755)
            made.chmod(0o755)
        files = [self._copy(path, draft / "files", kept / "files", rom=False) for path in wanted.files]
        files += [self._copy(path, draft / "roms", kept / "roms", rom=True) for path in _roms(wanted)]
        write_atomically(draft / INDEX, msgspec.json.encode([file for file in files if file]))
        for directory in (draft / "files", draft / "roms"):
            sync_directory(directory)
        self.forget(vm)
        draft.rename(kept)
        sync_directory(self._root)

    def kept(self, vm: str) -> list[KeptFile]:
        try:
            return _READ.decode(read_own(self._root / vm / INDEX))
        except (OSError, msgspec.MsgspecError):
            return []

    def changed(self, vm: str) -> list[KeptFile]:
        return [file for file in self.kept(vm) if not _is_unchanged(file)]

    def forget(self, vm: str) -> None:
        shutil.rmtree(self._root / vm, ignore_errors=True)
        with self._lock:
            for content in (self._root / CONTENTS).glob("*"):
                if content.stat().st_nlink == 1:
                    content.unlink()

    def _copy(self, path: str, draft: Path, final: Path, *, rom: bool) -> KeptFile | None:
        """None if there is no such file, none that can be firmware, or none that any user may read. Raises OSError."""
        try:
            with file_at(Path(path)) as file:
                info, content = os.fstat(file.fileno()), file.read(FILE_BYTES + 1)
        except OSError:
            return None
        if len(content) > FILE_BYTES or not info.st_mode & stat.S_IROTH:
            return None
        digest = hashlib.sha256(content).hexdigest()
        name = Path(path).name if rom else digest
        kept = self._root / CONTENTS / digest
        with self._lock:
            if not kept.exists():
                write_atomically(kept, content, mode=0o644)
            (draft / name).unlink(missing_ok=True)  # two options may name one file
            (draft / name).hardlink_to(kept)
        return KeptFile(
            path=path,
            copy=str(final / name),
            sha256=digest,
            size_bytes=len(content),
            rom=rom,
            st_dev=info.st_dev,
            inode=info.st_ino,
            mtime_ns=info.st_mtime_ns,
        )


def _roms(wanted: Firmware) -> Iterator[str]:
    """Those that QEMU would find, of each name the first."""
    seen: set[str] = set()
    for directory in wanted.directories:
        for path in sorted(Path(directory).glob("*")):
            named = path.name in wanted.names or path.suffix in ROM_SUFFIXES
            if named and path.name not in seen and path.is_file():
                seen.add(path.name)
                if path.name in wanted.names or path.stat().st_size <= ROM_BYTES:
                    yield str(path)


def _is_unchanged(file: KeptFile) -> bool:
    """By its looks: a guest waits for it."""
    try:
        info = os.stat(file.path)  # noqa: PTH116 - for each of them
    except OSError:
        return False
    found = (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size)
    return found == (file.st_dev, file.inode, file.mtime_ns, file.size_bytes)
