# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a domain's QEMU lives: libvirt starts and ends it, and the agent lets it have its memory. Implements
core.ports.Place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import Difference, Inventory, Launch, MemoryIdentity, QemuFacts
from cpr_agent.core.ports import Qemu
from cpr_agent.domains.channel import PassThrough
from cpr_agent.domains.connection import Libvirt, dotted, installed_version
from cpr_agent.domains.desk import REASON_S, Desk, Start
from cpr_agent.domains.gate import Gate
from cpr_agent.domains.hook_server import HookRequest, parent_of
from cpr_agent.domains.host import (
    LibvirtPaths,
    command_line,
    has_image_open,
    has_open,
    kill,
    maps_whole,
    qemu_pid,
    qemu_uid,
)
from cpr_agent.domains.images import Images
from cpr_agent.domains.monitor import Listening, listening
from cpr_agent.domains.names import NAMESPACE, PREFIX, Places
from cpr_agent.domains.qemu import DomainQemu, leave_ram_in_place
from cpr_agent.domains.reads import Reads
from cpr_agent.errors import CprError, LoadFailed, QemuEnded, QemuFailed, QemuRefused, QemuUnreachable
from cpr_agent.host.waiting import ended
from cpr_agent.vm.facts import older
from cpr_agent.vm.qmp import Qmp, SocketQmp
from cpr_agent.vm.replies import STATUS

log = logging.getLogger(__name__)

_ELEMENT, _LIVE = 2, 1
"""VIR_DOMAIN_METADATA_ELEMENT, VIR_DOMAIN_AFFECT_LIVE."""
_CHECKPOINT = re.compile(r"""\s+checkpoint\s*=\s*("[^"]*"|'[^']*')""")
CONNECT_S = 120.0
"""From libvirt's question to the QEMU's connection: libvirt looks at the domain's disks and networks meanwhile."""
THERE_S = 90.0
"""For libvirt's daemon: the agent is there before it at boot."""
SETTLE_S = 40.0
"""For the end of a start that is given up; libvirt may be in the middle of it."""


class Records(Protocol):
    """What the agent notes of each QEMU, until the host starts anew."""

    def launch(self, place: str) -> Launch | None: ...

    def record(self, place: str, launch: Launch) -> None: ...

    def launched_all(self) -> list[str]: ...

    def inventory(self, place: str) -> Inventory | None: ...

    def record_inventory(self, place: str, inventory: Inventory) -> None: ...


class World(msgspec.Struct, frozen=True):
    """What all domains share. ``open_memory`` opens the RAM at a node, and proves on the descriptor that it is the one."""

    libvirt: Libvirt
    desk: Desk
    gate: Gate
    places: Places
    host: LibvirtPaths
    records: Records
    open_memory: Callable[[str, MemoryIdentity], int]
    checkpoint_of: Callable[[str], str]
    images: Images
    reads: Reads
    """Of libvirt's images."""
    own_monitors: dict[str, Qmp]
    """Of domains whose QEMU has connected to this agent."""
    spawn: Callable[[Coroutine[None, None, None]], None]
    """For work that no act waits for."""
    is_saved: Callable[[str], bool]
    """Whether the domain has a live checkpoint."""

    def has_loaded(self, domain: str) -> bool:
        """Whether its QEMU has come from a checkpoint."""
        launch = self.records.launch(domain)
        return launch is not None and launch.kind == "load" and qemu_pid(self.host.pid_file(domain), domain) != 0

    async def destroy(self, domain: str) -> None:
        """Have libvirt end its QEMU; an image that it has stays."""
        with contextlib.suppress(QemuFailed):
            await self.libvirt.aside(domain, "ended it", lambda found: found.destroy())

    async def forget_checkpoint(self, domain: str) -> None:
        """The domain runs with the XML of the image that it was restored from: a save by hand must not pass for that
        checkpoint. Raises QemuFailed."""

        def clear(found: Any) -> None:
            was = found.metadata(_ELEMENT, NAMESPACE, _LIVE)
            now = without_checkpoint(was)
            if now != was:
                found.setMetadata(_ELEMENT, now, PREFIX, NAMESPACE, _LIVE)
            if found.hasManagedSaveImage() and not self.is_saved(domain):
                found.managedSaveRemove()

        await self.libvirt.aside(domain, "forgotten its checkpoint", clear)


def allow(world: World, start: Start, request: HookRequest) -> str:
    """An answer to ``prepare``, and the gate is open if it is a yes."""
    launch = start.launch
    assert launch
    carried, wanted = world.checkpoint_of(request.xml), launch.checkpoint if launch.kind == "load" else ""
    if carried != wanted:
        return f"what is started has the state of {_said(carried)}, and the agent allows {_said(wanted)}"
    if wanted and not _restores(world, parent_of(request.pid), launch.vm):
        return f"another image is restored than {world.host.image(launch.vm)}, which the agent has proved"
    try:
        fd = world.open_memory(launch.nodes[0], launch.memory[0])
        try:
            world.gate.open(launch.vm, launch.nodes[0], fd, start.uid)
        finally:
            os.close(fd)
    except (CprError, OSError) as error:
        return str(error)
    return ""


def without_checkpoint(element: str) -> str:
    """The agent's element in a domain's metadata, without the checkpoint's id in its first tag."""
    head, end, rest = element.partition(">")
    return _CHECKPOINT.sub("", head) + end + rest


def _restores(world: World, libvirt: int, domain: str) -> bool:
    """Whether libvirt reads the image that the agent has proved. libvirt 12.9 has a helper for that, which may be done with
    a small one by now: then the image was read since it was put there, or since the last look."""
    image = world.host.image(domain)
    read = world.reads.was_read(image)
    with contextlib.suppress(OSError):
        world.reads.mark_unread(image)
    return has_open(libvirt, image) or (read and not has_image_open(libvirt, domain))


def _said(checkpoint: str) -> str:
    return f"checkpoint {checkpoint}" if checkpoint else "none"


class DomainPlace:
    delegated = True

    def __init__(self, name: str, world: World) -> None:
        self._name = name
        self._world = world

    @property
    def directory(self) -> str:
        """None: libvirt has one for each QEMU."""
        return ""

    async def pid(self) -> int:
        return qemu_pid(self._world.host.pid_file(self._name), self._name)

    async def start(self, launch: Launch) -> None:
        world, name = self._world, self._name
        await self._after_the_one_before()
        uid = qemu_uid(world.host.settings)
        world.records.record(name, launch)
        with listening(world.places.monitor(name), uid) as own:
            start, arrived = world.desk.begin(name, launch, uid)
            if not arrived:
                start.creating = asyncio.ensure_future(self._create(start))
                start.creating.add_done_callback(lambda done: self._created(start, done))
            try:
                await self._allowed(start)
                qmp = await self._connected(start, own)
                self._let_in(start, launch)
                start.qmp = world.own_monitors[name] = qmp
                if launch.kind == "load":
                    await leave_ram_in_place(qmp, on=True)
                    return
                await self._first(start.started, start, CONNECT_S, "libvirt has not started it")
                start.say("")
                world.desk.forget(name, start)
            except BaseException:
                await self._give_up(start)
                raise
        if start.creating:  # whoever calls libvirt next is not to meet this one
            await asyncio.wait({start.creating}, timeout=SETTLE_S)

    async def _allowed(self, start: Start) -> None:
        """Raises QemuFailed."""
        allowed = asyncio.ensure_future(start.allowed.wait())
        try:
            await self._first(allowed, start, THERE_S + CONNECT_S, "libvirt has not asked whether it may start")
        finally:
            allowed.cancel()

    async def _create(self, start: Start) -> None:
        """Unless somebody else starts the domain first: at boot libvirt's daemon may do so by itself, before it answers
        anybody. Not after that either, when the domain may have been shut off again. Raises QemuRefused,
        QemuUnreachable."""
        startable = asyncio.ensure_future(self._until_startable())
        allowed = asyncio.ensure_future(start.allowed.wait())
        try:
            await asyncio.wait({startable, allowed}, return_when=asyncio.FIRST_COMPLETED)
            if not allowed.done():
                await startable
                await self._world.libvirt.create(self._name)
        finally:
            for task in (startable, allowed):
                task.cancel()
            await asyncio.gather(startable, allowed, return_exceptions=True)

    async def _until_startable(self) -> None:
        """Raises QemuRefused, QemuUnreachable."""
        await self._world.libvirt.until_there(THERE_S)
        await self._world.libvirt.until_off(self._name)

    def _created(self, start: Start, creating: asyncio.Future[None]) -> None:
        """It may have failed because somebody else starts the domain just then, which is as good."""
        if creating.cancelled() or (error := creating.exception()) is None:
            return
        if not (start.allowed.is_set() and qemu_pid(self._world.host.pid_file(self._name), self._name)):
            start.end(error.what if isinstance(error, CprError) else str(error))

    async def _first(self, wanted: asyncio.Future[Any], start: Start, timeout_s: float, otherwise: str) -> None:
        """Raises QemuFailed unless ``wanted`` comes before the end of the start."""
        either: set[asyncio.Future[Any]] = {wanted, start.ended}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            what = await start.reason() if start.ended.done() else f"{otherwise} within {timeout_s:g} s"
            raise QemuFailed(what, vm=self._name)

    async def _connected(self, start: Start, own: Listening) -> Qmp:
        """The agent's own monitor. Raises QemuFailed."""

        def pid() -> int:
            return qemu_pid(self._world.host.pid_file(self._name), self._name)

        waiting = asyncio.ensure_future(own.connection(pid))
        try:
            await self._first(waiting, start, CONNECT_S, "no QEMU has connected to the agent")
        except BaseException:
            waiting.cancel()
            raise
        try:
            return await SocketQmp.over(self._name, waiting.result(), CONNECT_S)
        except QemuUnreachable as error:  # libvirt knows what it has said before it ended
            await asyncio.wait({start.ended}, timeout=REASON_S)
            raise (QemuFailed(await start.reason(), vm=self._name) if start.ended.done() else error) from error

    def _let_in(self, start: Start, launch: Launch) -> None:
        """Its QEMU has its memory: nobody needs the way to it any more. Raises QemuFailed, MemoryUnusable."""
        world, pid = self._world, qemu_pid(self._world.host.pid_file(self._name), self._name)
        fd = world.open_memory(launch.nodes[0], launch.memory[0])
        try:
            world.gate.close(self._name)
            memory = launch.memory[0]
            if not maps_whole(pid, fd, memory.offset_bytes, memory.size_bytes):
                what = f"its QEMU (PID {pid}) does not have the memory {launch.nodes[0]} that belongs to it"
                raise QemuFailed(what, vm=self._name, remedy="see <qemu:commandline> in its XML")
        finally:
            os.close(fd)
        argv = command_line(pid)
        start.launch = replace(launch, argv=argv, base_argv=argv)
        world.records.record(self._name, start.launch)

    async def _after_the_one_before(self) -> None:
        """libvirt may still be in the middle of a start that was given up."""
        if before := self._world.desk.start_of(self._name):
            before.say("it was given up")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await asyncio.shield(before.ended)
            self._world.desk.forget(self._name, before)

    async def connect(self, timeout_s: float) -> Qemu:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._connect(timeout_s)
        except TimeoutError:
            raise QemuUnreachable(f"libvirt has not answered within {timeout_s:g} s", vm=self._name) from None

    async def _connect(self, timeout_s: float) -> Qemu:
        world, name = self._world, self._name
        launch, pid = world.records.launch(name), await self.pid()
        start = world.desk.start_of(name)
        own = world.own_monitors.get(name)
        if own and not own.gone:
            return DomainQemu(own, launch, pid, world, start, self._give_up)
        qmp = await PassThrough.open(name, world.libvirt)
        asking = asyncio.ensure_future(qmp.ask(STATUS, timeout_s=timeout_s))
        again = asyncio.ensure_future(world.desk.asked_again(name))
        try:
            await asyncio.wait({asking, again}, return_when=asyncio.FIRST_COMPLETED)
            if again.done():
                return DomainQemu(qmp, launch, pid, world, again.result(), self._give_up)
            asking.result()
            with contextlib.suppress(QemuFailed):  # of an agent that was killed in a save; not while QEMU is at it still
                await leave_ram_in_place(qmp, on=False)
        except BaseException:
            await qmp.close()
            raise
        finally:
            for task in (asking, again):
                task.cancel()
            await asyncio.gather(asking, again, return_exceptions=True)
        return DomainQemu(qmp, launch, pid, world, None, self._give_up)

    async def lacks(self, launch: Launch, was: QemuFacts) -> list[Difference]:
        """By what libvirt finds out of the program; of one that is not its default it tells no version."""
        emulator = launch.base_argv[0]

        def look(connection: Any) -> int:
            connection.getDomainCapabilities(emulator, None, was.machine_type, None, 0)
            return installed_version(connection, emulator)

        deed = "found its machine in the QEMU that is installed"
        try:
            version = await self._world.libvirt.of(self._name).ask(self._name, deed, look)
        except QemuRefused as error:
            return [Difference("machine type", was.machine_type, error.what)]
        return older(was.version, dotted(version)) if version else []

    async def settle(self) -> None:
        """Of a guest that is not to run after its load; the answer for one that is has been given by ``cont``."""
        start = self._world.desk.start_of(self._name)
        if start is None or start.given_up or start.answer.done():
            return
        if start.qmp:
            await leave_ram_in_place(start.qmp, on=False)
        start.say("")
        self._world.desk.forget(self._name, start)
        if start.creating:
            await asyncio.wait({start.creating}, timeout=SETTLE_S)
        if start.ended.done():
            raise LoadFailed(await start.reason(), vm=self._name)
        self._world.spawn(self._world.forget_checkpoint(self._name))

    async def wait_exit(self, timeout_s: float) -> bool:
        pid = await self.pid()
        return not pid or await ended(pid, timeout_s)

    async def kill(self) -> None:
        """By libvirt, or by the kernel where libvirt does not answer, or waits for the agent's own answer."""
        start = self._world.desk.start_of(self._name)
        if start:
            await self._give_up(start)
        elif pid := await self.pid():
            await self._world.destroy(self._name)
            kill(pid, self._name)
        self._world.gate.close(self._name)
        await self.wait_exit(SETTLE_S)

    async def _give_up(self, start: Start) -> None:
        """No guest has run in its QEMU. libvirt keeps the image."""
        start.given_up = True
        self._world.gate.close(self._name)
        if pid := await self.pid():
            if not kill(pid, self._name):
                start.say("the agent has given it up: see `cprctl status`")
                await self._world.destroy(self._name)
            await self.wait_exit(SETTLE_S)
        asyncio.get_running_loop().call_later(REASON_S, start.say, "the agent has given it up: see `cprctl status`")
        if start.creating and not start.creating.done():  # its question may still come, and is refused
            start.creating.add_done_callback(lambda _: self._world.desk.forget(self._name, start))
        elif not start.allowed.is_set() or start.ended.done():
            self._world.desk.forget(self._name, start)

    async def ended_by(self, timeout_s: float) -> int:  # noqa: ARG002 - libvirt's child
        return 0

    def log_tail(self) -> str:
        """What libvirt says of a failed start has the end of the log in it."""
        return ""


class NoPlace:
    """A domain has one QEMU. Implements core.ports.Place."""

    delegated = True
    directory = ""

    async def start(self, launch: Launch) -> None:
        raise QemuFailed("libvirt runs one QEMU of a domain at a time", vm=launch.vm)

    async def connect(self, timeout_s: float) -> Qemu:  # noqa: ARG002
        raise QemuEnded("there is no second QEMU of a domain")

    async def lacks(self, launch: Launch, was: QemuFacts) -> list[Difference]:  # noqa: ARG002
        return []

    async def settle(self) -> None:
        """Nothing waits."""

    async def pid(self) -> int:
        return 0

    async def wait_exit(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    async def kill(self) -> None:
        """There is none."""

    async def ended_by(self, timeout_s: float) -> int:  # noqa: ARG002
        return 0

    def log_tail(self) -> str:
        return ""
