"""Programs that VMs run, kept while others take their place on disk; implements core.ports.Programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

_BESIDE = ("share", "lib", "lib64", "libexec")
"""Where a QEMU looks for its firmware and its modules, beside the directory that it is in (QEMU, get_relocated_path() in
util/cutils.c)."""


class KeptPrograms:
    """``root`` has a directory for each VM, in which the copy finds what the program itself found beside its own: by links,
    so that it is what is installed now. Any user can execute what is in it, and root alone can write."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def keep(self, vm: str, pid: int, arguments: Sequence[str]) -> None:
        process = Path(f"/proc/{pid}")
        if (process / "cmdline").read_bytes().split(b"\0")[1:-1] != [os.fsencode(word) for word in arguments]:
            raise OSError("a wrapper has started it, with more than the arguments that it was given")
        program = Path(str((process / "exe").readlink()).removesuffix(" (deleted)"))
        directory = self._root / vm
        copy = directory / (program.parent.name or "bin") / program.name
        if copy == program and copy.is_file():  # brought back before; what is beside it is there too
            return
        if directory.exists():
            shutil.rmtree(directory)
        for made in (self._root.parent, self._root, directory, copy.parent):
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o755)
        for name in _BESIDE:
            if (beside := program.parent.parent / name).is_dir() and name != copy.parent.name:
                (directory / name).symlink_to(beside)
        with (process / "exe").open("rb") as source, copy.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        copy.chmod(0o755)
        if not os.access(copy, os.X_OK):  # also root's, on a file system that is mounted noexec (access(2))
            shutil.rmtree(directory)
            raise OSError(f"{directory} is on a file system that is mounted noexec")

    def kept(self, vm: str, sha256: str) -> str:
        own = [path for path in (self._root / vm).glob("*") if not path.is_symlink()]
        with contextlib.suppress(OSError):  # it can't be read, so it is not kept
            for copy in (file for path in own for file in path.iterdir()):
                with copy.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                        return str(copy)
        return ""

    def forget(self, vm: str) -> None:
        shutil.rmtree(self._root / vm, ignore_errors=True)
