# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot loader entries, which say which initrd belongs to an image (UAPI.1, "Boot Loader Specification").

systemd-boot and GRUB (as Fedora has it) read the same files. They lie on a file system without owners, and people write
them by hand: a bad one is passed over, and said.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from cpr_agent.host.kernels.files import children, open_regular

ENTRY_BYTES = 64 << 10
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_TRIES = re.compile(r"\+(\d+)(?:-\d+)?$")


class Entry(NamedTuple):
    """``linux`` and ``initrds`` as written, from the top of a file system. ``problem`` says why it is of no use, "" if it
    is; ``tries_left`` is 0 when the boot loader has given it up."""

    path: str
    linux: str = ""
    initrds: tuple[str, ...] = ()
    version: str = ""
    machine_id: str = ""
    problem: str = ""
    tries_left: int | None = None

    @property
    def words(self) -> str:
        """All in which a kernel's version may stand."""
        return " ".join((Path(self.path).name, self.version, self.linux))


def read_entries(boot: Path) -> list[Entry]:
    return [_read(path) for path in children(boot / "loader/entries", "*.conf")]


def tries_left(name: str) -> int | None:
    """Of a file that the boot loader counts down: 2 of ``id+2-1.conf`` ("Boot counting"). None if it does not."""
    found = _TRIES.search(name.rpartition(".")[0])
    return int(found[1]) if found else None


def _read(path: Path) -> Entry:
    entry = Entry(str(path), tries_left=tries_left(path.name))
    try:
        with open_regular(path, follow=False) as file:
            raw = file.read(ENTRY_BYTES + 1)
        if len(raw) > ENTRY_BYTES:
            return entry._replace(problem=f"it has more than {ENTRY_BYTES >> 10} KiB")
        lines = raw.decode().splitlines()
    except OSError as error:
        return entry._replace(problem=f"it can't be read: {error.strerror}")
    except UnicodeDecodeError:
        return entry._replace(problem="it is not UTF-8")
    keys: dict[str, list[str]] = {}
    for line in filter(str.strip, lines):
        key, *value = line.split(maxsplit=1)
        if value and not key.startswith("#"):
            keys.setdefault(key, []).append(value[0].strip())
    prefix = _MACHINE_ID.match(path.name)
    entry = entry._replace(
        linux=next(iter(keys.get("linux") or keys.get("uki") or keys.get("efi") or []), ""),
        # GRUB takes several in a line, and variables such as $tuned_initrd
        initrds=tuple(word for line in keys.get("initrd", []) for word in line.split() if not word.startswith("$")),
        version=next(iter(keys.get("version", [])), "").rpartition("@")[2],  # openSUSE has the snapshot before it
        machine_id=next(iter(keys.get("machine-id", [])), prefix[0] if prefix else ""),
    )
    if not entry.linux:
        return entry._replace(problem="it names no kernel (linux, uki or efi)")
    if bad := next((word for word in (entry.linux, *entry.initrds) if _leaves(word)), ""):
        return entry._replace(problem=f"{bad!r} is no path within a file system")
    return entry


def _leaves(path: str) -> bool:
    return ".." in path.split("/") or "\0" in path or not path.isprintable()
