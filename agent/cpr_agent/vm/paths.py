# SPDX-License-Identifier: GPL-2.0-or-later
"""Paths in QEMU's arguments that are relative to where it was started: a VM's unit starts it somewhere else."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable
from typing import Any

_WHOLE = frozenset(
    ("-cdrom", "-hda", "-hdb", "-hdc", "-hdd", "-fda", "-fdb", "-sd", "-mtdblock", "-pflash", "-kernel", "-initrd", "-dtb")
)
"""Options that are a path as a whole."""
_KEYS = {
    "-drive": ("file",),
    "-blockdev": ("filename", "file.filename"),
    "-chardev": ("path",),
    "-object": ("filename", "file", "dir"),
    "-fw_cfg": ("file",),
    "-smbios": ("file",),
    "-acpitable": ("file", "data"),
    "-fsdev": ("path",),
    "-virtfs": ("path",),
}
"""Keys whose value is a path. ``-bios``, ``romfile`` and ``-L`` are looked for in QEMU's own directories too."""
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""``nbd:…``, ``rbd:…``, ``json:…``: no path."""


def whole_paths(name: str, text: str, directory: str) -> tuple[str, list[tuple[str, str]]]:
    """``text`` of an option with its paths from the root, as far as ``directory`` says; and notes, as outcome and why."""
    notes: list[tuple[str, str]] = []

    def whole(path: str) -> str:
        if not path or path.startswith(("/", "$")) or _PROTOCOL.match(path):
            return path
        if not directory.startswith("/"):
            notes.append(("look", f"the path {path} is relative to where that QEMU was started: name it from the root"))
            return path
        resolved = os.path.normpath(os.path.join(directory, path))  # noqa: PTH118 - the path of another program
        notes.append(("changed", f"the path {path} was relative to {directory}"))
        return resolved

    if name in _WHOLE:
        return whole(text), notes
    keys = _KEYS.get(name, ())
    if not keys:
        return text, notes
    if text.startswith("{"):
        return _whole_in_json(text, keys, whole), notes
    words = text.replace(",,", "\0").split(",")
    last = {word.partition("=")[0]: index for index, word in enumerate(words)}  # of a key that comes again QEMU takes this
    for key in filter(last.__contains__, keys):
        _, equals, path = words[last[key]].partition("=")
        if equals:
            words[last[key]] = f"{key}={whole(path.replace(chr(0), ',')).replace(',', chr(0))}"
    return ",".join(words).replace("\0", ",,"), notes


def _whole_in_json(text: str, keys: tuple[str, ...], whole: Callable[[str], str]) -> str:
    """``text`` as it is if no path in it changes, or if it is no JSON, which QEMU would refuse."""
    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        return text
    before = json.dumps(value)
    for key in keys:
        _at(value, key.split("."), whole)
    return text if json.dumps(value) == before else json.dumps(value, separators=(",", ":"))


def _at(value: dict[str, Any], path: list[str], change: Any) -> None:
    first, *rest = path
    if rest and isinstance(value.get(first), dict):
        _at(value[first], rest, change)
    elif not rest and isinstance(value.get(first), str):
        value[first] = change(value[first])
