# SPDX-License-Identifier: GPL-2.0-or-later
"""Other units of the host: how they depend on each other, how long they took, their stop and their start; implements
core.ports.Units.

systemctl asks PID 1 for all units at once, in a process of its own: some hundred calls of ``sd_bus_call`` would hold the
event loop. journalctl tells of the boot before. What either says is bounded in time and in size.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from pystemd.dbusexc import DBusBaseError

from cpr_agent.core.model import BootTimes, Unit, UnitStop
from cpr_agent.host.systemd import Systemd

log = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""systemctl reads all properties of each unit: a fraction of a second, and long on an emulated host."""
END_S = 5.0
"""For the end of a program that was killed."""
MAX_BYTES = 16 << 20
"""Far more than the units of any host, or the stops of a shutdown."""
LINE_BYTES = 1 << 20

OWN: Final = ("cpr-agent.service", "cpr-early.service", "cpr-save.service", "cpr-gate.service", "cpr-load.service")
_UNNAMED_NEEDS: Final = (
    "dbus.socket",
    "dbus.service",
    "dbus-broker.service",
    "polkit.service",
    "systemd-logind.service",
    "systemd-udevd.service",
    "systemd-journald.service",
    "init.scope",
)
"""The bus and its authority, an inhibitor against other shutdowns, devices, the log; PID 1."""

STOPPING, STOPPED = "de5b426a63be47a7b6ac3eaac82e2f6f", "9d1aaa27d60140bd96365438aad20286"
"""SD_MESSAGE_UNIT_STOPPING and _STOPPED (sd-messages.h)."""
_JOURNAL = ("journalctl", "--quiet", "--no-pager", "--output=json")
_INITRD = r"Freeing initrd memory: (\d+)K"
_INIT = r"Run \S+ as init process"
"""Of the kernel: free_initrd_mem() in init/initramfs.c, run_init_process() in init/main.c."""

_TAKES_ALONG = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""To these a stop propagates (UNIT_ATOM_PROPAGATE_STOP in src/core/unit-dependency-atom.c)."""
_REQUIRES = ("Requires", "Requisite", "BindsTo")
_STARTED = ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic", "InactiveEnterTimestampMonotonic")
_SHOWN = (
    *("Id", "Names", "LoadState", "ActiveState", "Where", "Transient"),
    *("CanStart", "CanStop", "RefuseManualStart", "RefuseManualStop"),
    *(*_REQUIRES, *_TAKES_ALONG, "Wants", "Upholds", "After", "Before", "TriggeredBy", *_STARTED),
)


class SystemdUnits:
    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd

    @property
    def needed(self) -> Collection[str]:
        return (*OWN, *_UNNAMED_NEEDS)

    async def all(self, names: Collection[str] = ()) -> dict[str, Unit]:
        command = ("systemctl", "show", f"--property={','.join(_SHOWN)}", "--", *names, "*")
        return {unit.name: unit for unit in units_of(await said(*command, whole=True))}

    async def stop(self, name: str) -> str:
        return await self._done(self._systemd.stop_unit, name)

    async def start(self, name: str) -> str:
        return await self._done(self._systemd.start_unit, name)

    def lacking(self, paths: Collection[str], devices: Collection[str], interfaces: Collection[str]) -> list[str]:
        """Nodes and interfaces have a unit once udev has done with them (systemd.device(5))."""
        named = [unit_name(path, "device") for path in devices]
        named += [unit_name(f"/sys/subsystem/net/devices/{one}", "device") for one in interfaces]
        try:
            to_come = self._systemd.mounts_to_come()
            mounts = dict.fromkeys(name for path in sorted(paths) for name in _mounts_of(path) if name in to_come)
            return [*mounts, *(name for name in named if self._systemd.active_state(name) != "active")]
        except DBusBaseError as error:
            log.warning("systemd does not say what is mounted: %s", error)
            return []

    async def _done(self, act: Any, name: str) -> str:
        try:
            result = await act(name, timeout_s=None)
        except DBusBaseError as error:
            result = str(error)
        return "" if result == "done" else f"{name}: systemd says {result}"

    async def stops(self, boot_id: str, since: float, until: float) -> list[UnitStop]:
        """``--until`` is a whole second, rounded up."""
        within = (f"--since=@{int(since)}", f"--until=@{int(until) + 1}")
        what = ("_PID=1", f"MESSAGE_ID={STOPPING}", f"MESSAGE_ID={STOPPED}")
        fields = "--output-fields=UNIT,MESSAGE_ID"
        entries = _entries(await said(*_JOURNAL, f"--boot={boot_id.replace('-', '')}", *within, fields, *what))
        return list(stops_of(entries, until))

    async def boot_times(self) -> BootTimes:
        fields = "--output-fields=MESSAGE,_SOURCE_MONOTONIC_TIMESTAMP"
        initrd_s, initrd_bytes = initrd_of(
            _entries(await said(*_JOURNAL, "--boot", "--dmesg", fields, until=partial(re.search, _INIT)))
        )
        with contextlib.suppress(DBusBaseError):
            initrd_s = initrd_s or self._systemd.manager_monotonic_s("InitRDTimestampMonotonic")
            return BootTimes(initrd_s, self._systemd.manager_monotonic_s("UserspaceTimestampMonotonic"), initrd_bytes)
        return BootTimes()


class NoUnits:
    """Of an agent without systemd; implements core.ports.Units."""

    needed: Collection[str] = ()

    async def all(self, names: Collection[str] = ()) -> dict[str, Unit]:  # noqa: ARG002 - the port's
        return {}

    async def stop(self, name: str) -> str:
        return f"{name}: the agent does not run under systemd"

    start = stop

    def lacking(self, paths: Collection[str], devices: Collection[str], interfaces: Collection[str]) -> list[str]:  # noqa: ARG002
        return []

    async def stops(self, boot_id: str, since: float, until: float) -> list[UnitStop]:  # noqa: ARG002 - likewise
        return []

    async def boot_times(self) -> BootTimes:
        return BootTimes()


async def said(*command: str, until: Callable[[str], object] = lambda line: None, whole: bool = False) -> list[str]:
    """The lines that a program prints, up to its end, to the first of which ``until`` is true, or to its bounds; it is
    killed then. None of a program that is not there; and with ``whole`` none of one that did not end by itself."""
    try:
        child = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, limit=LINE_BYTES)
    except OSError:
        return []
    lines: list[str] = []
    complete = False
    try:
        size = 0
        # TimeoutError: its time is over; ValueError: a line without an end.
        with contextlib.suppress(TimeoutError, ValueError):
            async with asyncio.timeout(TIMEOUT_S):
                while child.stdout and (raw := await child.stdout.readline()) and (size := size + len(raw)) <= MAX_BYTES:
                    lines.append(raw.decode(errors="replace").rstrip("\n"))
                    if until(lines[-1]):
                        break
                complete = not raw and await child.wait() >= 0  # a unit that has gone meanwhile makes systemctl fail
        return lines if complete or not whole else []
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                # asyncio knows of no end of a child before that of its pipe.
                while child.stdout and await child.stdout.read(LINE_BYTES):
                    pass
                await child.wait()


def unit_name(path: str, kind: str) -> str:
    """The unit of a mount or a device at ``path`` (systemd.unit(5), "String Escaping for Inclusion in Unit Names")."""
    plain = "/".join(part for part in path.split("/") if part)

    def escaped(character: str, first: bool) -> str:  # noqa: FBT001
        if character == "/":
            return "-"
        if (character.isascii() and character.isalnum()) or character in ":_" or (character == "." and not first):
            return character
        return "".join(f"\\x{byte:02x}" for byte in character.encode())

    return f"{''.join(escaped(one, not number) for number, one in enumerate(plain)) or '-'}.{kind}"


def _mounts_of(path: str) -> Iterator[str]:
    """The names that mounts on the way to it would have."""
    return (unit_name(str(one), "mount") for one in (Path(path), *Path(path).parents))


def units_of(lines: Iterable[str]) -> Iterator[Unit]:
    """Of what `systemctl show` prints: a line a property, and an empty line between units. What was cut off is left out."""
    shown: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition("=")
            shown[name] = value
        elif shown:
            yield _unit(shown)
            shown = {}
    if shown.keys() >= set(_SHOWN[:4]):
        yield _unit(shown)


def _unit(shown: dict[str, str]) -> Unit:
    def names(*properties: str) -> frozenset[str]:
        return frozenset(name for one in properties for name in shown.get(one, "").split())

    def says(name: str) -> bool:
        return shown.get(name) == "yes"

    began_s, *ends = (_seconds(shown.get(name)) for name in _STARTED)
    return Unit(
        name=shown.get("Id", ""),
        aliases=names("Names"),
        load_state=shown.get("LoadState", ""),
        active_state=shown.get("ActiveState", ""),
        startable=says("CanStart") and not says("RefuseManualStart") and not says("Transient"),
        stoppable=says("CanStop") and not says("RefuseManualStop"),
        requires=names(*_REQUIRES),
        wants=names("Wants", "Upholds"),
        takes_along=names(*_TAKES_ALONG),
        after=names("After"),
        before=names("Before"),
        triggered_by=names("TriggeredBy"),
        mount_point=shown.get("Where", ""),
        began_s=began_s,
        # A oneshot without RemainAfterExit= was never active: it has started when it is inactive again.
        ended_s=next((end for end in ends if end and end >= began_s), 0.0) if began_s else 0.0,
    )


def stops_of(entries: Iterable[dict[str, Any]], until: float) -> Iterator[UnitStop]:
    """Entries of STOPPING and STOPPED, oldest first. A stop of which no end was written lasted until the end."""
    begun: dict[str, float] = {}
    for entry in entries:
        unit, at = entry.get("UNIT"), _seconds(entry.get("__REALTIME_TIMESTAMP"))
        if not isinstance(unit, str) or not at:
            continue
        if entry.get("MESSAGE_ID") == STOPPING:
            begun[unit] = at
        elif entry.get("MESSAGE_ID") == STOPPED:
            yield UnitStop(unit, begun.pop(unit, at), at)
    for unit, at in begun.items():
        yield UnitStop(unit, at, max(at, until))


def initrd_of(entries: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """When the initrd's init began (s since the kernel's own start), and the bytes that the kernel freed once the initrd
    was unpacked; 0 where the kernel says nothing of one."""
    freed = 0
    for entry in entries:
        message = str(entry.get("MESSAGE"))
        if found := re.search(_INITRD, message):
            freed = int(found[1]) << 10
        elif re.search(_INIT, message):
            return _seconds(entry.get("_SOURCE_MONOTONIC_TIMESTAMP")) if freed else 0.0, freed
    return 0.0, freed


def _entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Of what journalctl(1) prints as JSON."""
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def _seconds(microseconds: Any) -> float:
    """Of a property or a field; 0 for what is none."""
    text = microseconds if isinstance(microseconds, str) else ""
    return int(text) / 1e6 if text.isascii() and text.isdigit() else 0.0
