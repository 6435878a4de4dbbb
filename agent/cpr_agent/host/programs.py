# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of programs that VMs run, kept for when a new one takes their place; implements core.ports.Programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cpr_agent.files import command_line_of

_BESIDE = ("share", "lib", "lib64", "libexec")
"""A QEMU looks for firmware and modules here, beside its own directory (get_relocated_path() in QEMU's util/cutils.c)."""


class KeptPrograms:
    """``root`` has a directory for each VM. There the copy finds firmware and modules where the program found them: links
    lead to the installed ones. Any user can execute the copy, and root alone can write."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def keep(self, vm: str, pid: int, arguments: Sequence[str]) -> None:
        process = Path(f"/proc/{pid}")
        if command_line_of(pid)[1:] != [os.fsencode(word) for word in arguments]:
            raise OSError("a wrapper has started it with other arguments than the agent gave")
        program = Path(str((process / "exe").readlink()).removesuffix(" (deleted)"))
        directory = self._root / vm
        copy = directory / (program.parent.name or "bin") / program.name
        if copy == program and copy.is_file():  # the VM runs the copy already
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
        if not os.access(copy, os.X_OK):  # refused to root too on a file system that is mounted noexec (access(2))
            shutil.rmtree(directory)
            raise OSError(f"{directory} is on a file system that is mounted noexec")

    def kept(self, vm: str, sha256: str) -> str:
        own = [path for path in (self._root / vm).glob("*") if not path.is_symlink()]
        with contextlib.suppress(OSError):  # an unreadable copy is as good as none
            for copy in (file for path in own for file in path.iterdir()):
                with copy.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                        return str(copy)
        return ""

    def forget(self, vm: str) -> None:
        shutil.rmtree(self._root / vm, ignore_errors=True)
