"""Which processes have a memory object open or mapped: QEMU takes no lock on it (FACTS.md), two of them would share RAM."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

Users = list[tuple[str, int]]
"""Name and PID."""
_Key = tuple[str, int, int]


class Wanted(NamedTuple):
    """A memory object, as descriptors of processes refer to it, and as their maps show it."""

    key: _Key
    mapping: str

    @classmethod
    def at(cls, node: Path) -> Wanted:
        """Raises OSError."""
        info = node.stat()
        # What maps shows: the device and inode of the node itself, also for a device.
        return cls(_key(info), f" {os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} ")


class Census:
    """Looks through all processes, once for all who ask while it is busy: each of a host's guests waits for the answer."""

    def __init__(self) -> None:
        self._asked: dict[Wanted, asyncio.Future[Users]] = {}
        self._walk: asyncio.Task[None] | None = None

    async def users(self, node: Path) -> Users:
        """Other processes that use ``node``, by a walk that begins after this call. Raises OSError."""
        wanted = Wanted.at(node)
        if wanted not in self._asked:
            self._asked[wanted] = asyncio.get_running_loop().create_future()
        answer = self._asked[wanted]
        if self._walk is None or self._walk.done():
            self._walk = asyncio.create_task(self._answer())
        return await asyncio.shield(answer)

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                found = await asyncio.to_thread(find_users, list(asked))
            except OSError as error:
                for answer in asked.values():
                    answer.set_exception(error)
                continue
            for wanted, answer in asked.items():
                answer.set_result(found[wanted])


def find_users(wanted: Collection[Wanted]) -> dict[Wanted, Users]:
    """Other processes that use each of them, as far as we may look (proc(5), fd and maps). Blocking. Raises OSError."""
    found: dict[Wanted, Users] = {one: [] for one in wanted}
    for process in PROC.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            opened = set(_open_files(process))
            maps = (process / "maps").read_text()
            users = [one for one in wanted if one.key in opened or one.mapping in maps]
            name = (process / "comm").read_text().strip() if users else ""
        except OSError:
            continue  # it has ended, or is not ours to look at
        for one in users:
            found[one].append((name, int(process.name)))
    return found


def _key(info: os.stat_result) -> _Key:
    """A device whatever its node is, or a file."""
    return ("device", info.st_rdev, 0) if stat.S_ISCHR(info.st_mode) else ("file", info.st_dev, info.st_ino)


def _open_files(process: Path) -> Iterator[_Key]:
    for descriptor in os.scandir(process / "fd"):
        try:
            yield _key(os.stat(descriptor.path))  # noqa: PTH116 - one call for each descriptor of each process
        except OSError:
            continue
