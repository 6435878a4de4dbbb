# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes that have a memory object open or mapped. QEMU takes no lock on it: two QEMUs would share their RAM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import msgspec

from cpr_agent.memory.statx import Key, key_of, known_key

PROC = Path("/proc")
MAPS_BYTES = 1 << 20
"""Of a process's maps at once. Most have a hundredth; there may be 65,530 lines (vm.max_map_count), with paths of 4 KiB."""

Users = list[tuple[str, int]]
"""Name and PID."""


class Wanted(msgspec.Struct, frozen=True):
    """A memory object, as processes' descriptors refer to it, and as their maps show it."""

    key: Key
    mapping: bytes

    @classmethod
    def at(cls, node: Path) -> Wanted:
        """Raises OSError."""
        info = node.stat()
        # /proc/PID/maps shows the device and inode of the node, also for a device.
        return cls(key_of(info), b" %02x:%02x %d " % (os.major(info.st_dev), os.minor(info.st_dev), info.st_ino))


class Census:
    """Walks all processes, once for all callers that come while it walks: each of a host's guests waits for the answer."""

    def __init__(self, thread: Executor | None = None) -> None:
        self._thread = thread
        self._asked: dict[Wanted, asyncio.Future[Users]] = {}
        self._own: frozenset[int] = frozenset()
        self._walk: asyncio.Task[None] | None = None

    async def users(self, node: Path, own: Collection[int] = ()) -> Users:
        """Other processes that use ``node``, by a walk that begins after this call. Raises OSError.

        ``own`` are the PIDs of live QEMUs, which are most of a walk's work. A walk leaves out those that all its callers
        name."""
        wanted = Wanted.at(node)
        self._own = self._own.intersection(own) if self._asked else frozenset(own)
        if wanted not in self._asked:
            self._asked[wanted] = asyncio.get_running_loop().create_future()
        answer = self._asked[wanted]
        if self._walk is None or self._walk.done():
            self._walk = asyncio.create_task(self._answer())
        return await asyncio.shield(answer)

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            walk = partial(find_users, list(asked), self._own | {os.getpid()})
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, walk)
            except OSError as error:
                for answer in asked.values():
                    answer.set_exception(error)
                continue
            for wanted, answer in asked.items():
                answer.set_result(found[wanted])


def find_users(wanted: Collection[Wanted], own: Collection[int]) -> dict[Wanted, Users]:
    """The users of each object but ``own``, as far as we may look (proc(5), fd, maps). Blocking. Raises OSError.

    It makes bare system calls: guests wait, and there may be thousands of descriptors. Any user's process may have as many
    and as long as the kernel lets it: none is kept that is not wanted."""
    found: dict[Wanted, Users] = {one: [] for one in wanted}
    keys = {one.key for one in wanted}
    for pid in os.listdir(PROC):  # noqa: PTH208
        if not pid.isdigit() or int(pid) in own:
            continue
        try:
            for place in _places(f"{PROC}/{pid}"):
                if (mapped := _mapped(f"{place}/maps", wanted)) is not None:
                    break
            else:
                continue  # a kernel thread, or one at its end: it has no memory
            opened = keys.intersection(_open_files(f"{place}/fd"))
            users = [one for one in wanted if one.key in opened or one in mapped]
            name = Path(f"{PROC}/{pid}/comm").read_bytes().decode(errors="replace").strip() if users else ""
        except OSError:
            continue  # it has ended, or we may not look
        for one in users:
            found[one].append((name, int(pid)))
    return found


def _places(process: str) -> Iterator[str]:
    """The directory that shows a process's memory and files: a thread's, if its first thread has ended."""
    yield process
    threads = os.listdir(f"{process}/task")  # noqa: PTH208
    if len(threads) > 1:
        yield from (f"{process}/task/{thread}" for thread in threads)


def _mapped(path: str, wanted: Collection[Wanted]) -> set[Wanted] | None:
    """Those that are in these maps; None if there are no maps."""
    mapped: set[Wanted] | None = None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        rest = b""
        while pieces := list(_some(fd)):
            maps = b"".join((rest, *pieces))
            mapped = (mapped or set()).union(one for one in wanted if one.mapping in maps)
            rest = maps[maps.rfind(b"\n") + 1 :]  # of a line
    finally:
        os.close(fd)
    return mapped


def _some(fd: int) -> Iterator[bytes]:
    """The next MAPS_BYTES or so; the kernel gives a page at a time."""
    read = 0
    while read < MAPS_BYTES and (piece := os.read(fd, 1 << 16)):
        read += len(piece)
        yield piece


def _open_files(directory: str) -> Iterator[Key]:
    with os.scandir(directory) as descriptors:
        for descriptor in descriptors:
            try:
                yield known_key(f"{directory}/{descriptor.name}")
            except OSError:
                continue
