# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's start and load, step by step, with a daemon of libvirt's that can be made to fail at each.

The daemon is a fake, because the real one can't be; with the real ones all of this runs in tests/libvirt. The QEMU is a
real process with a real mapping and a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from cpr_agent.core.model import Inventory, Launch, MemoryIdentity, QemuFacts, RunState
from cpr_agent.domains.connection import Heard, MonitorEvent
from cpr_agent.domains.desk import Desk
from cpr_agent.domains.hook_server import HookRequest
from cpr_agent.domains.host import LibvirtPaths
from cpr_agent.domains.names import Places
from cpr_agent.domains.place import DomainPlace, World, allow
from cpr_agent.domains.qemu import DomainQemu
from cpr_agent.domains.reads import Reads
from cpr_agent.errors import CprError, LoadFailed, QemuFailed, QemuRefused, QemuUnreachable
from tests.samples import in_file, launch

PATIENCE_S = 8.0
QEMU = Path(__file__).parent.parent / "domain_qemu.py"
PAGES = 16 << 12


class Gates:
    """Links that are there or not; the real ones are in test_domain_gate.py."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def open(self, name: str, node: str, descriptor: int, uid: int) -> None:  # noqa: ARG002
        path = self._places.gate(name)
        path.parent.mkdir(parents=True)
        path.symlink_to(node)

    def close(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._places.gate(name).unlink()
            self._places.gate(name).parent.rmdir()

    def is_open(self, name: str) -> bool:
        return os.path.lexists(self._places.gate(name))


class Notes:
    """Implements domains.place.Records in memory."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def launch(self, place: str) -> Launch | None:
        return self.launches.get(place)

    def record(self, place: str, launch: Launch) -> None:
        self.launches[place] = launch

    def launched_all(self) -> list[str]:
        return list(self.launches)

    def inventory(self, place: str) -> Inventory | None:  # noqa: ARG002
        return None

    def record_inventory(self, place: str, inventory: Inventory) -> None:
        """Nobody asks."""


class FakeLibvirt:
    """One domain, web1. ``carried`` is the checkpoint in what it restores; ``steps`` are what it passes, where a test may
    have something happen, or raise."""

    def __init__(self, room: Room) -> None:
        self.heard = Heard()
        self.room = room
        self.carried = ""
        self.qemu: asyncio.subprocess.Process | None = None
        self.said: list[dict[str, Any]] = []
        self._said = asyncio.Condition()
        self.steps: dict[str, Callable[[], Awaitable[None]]] = {}
        self.passed: list[str] = []
        self.memory, self.offset = "", 0
        self.emulator, self.version = "/usr/bin/qemu-system-x86_64", 10_000_002
        """libvirt's default one, as it is installed now."""
        self.machines = {"pc-q35-10.0"}

    # -- what the agent asks of it ------------------------------------------------------------------------------------

    async def until_there(self, timeout_s: float) -> None:
        """It is."""

    async def until_off(self, domain: str) -> None:  # noqa: ARG002
        await self._pass("until off")

    async def watch(self) -> None:
        """All is heard."""

    def of(self, domain: str) -> FakeLibvirt:  # noqa: ARG002
        return self

    async def call(self, domain: str, deed: str, work: object, timeout_s: float = 0) -> None:  # noqa: ARG002
        await self._pass(deed)

    async def ask(self, domain: str, deed: str, work: Callable[[Any], Any]) -> Any:  # noqa: ARG002
        def capabilities(emulator: str | None, arch: None, machine: str | None, kind: None, flags: int) -> str:
            assert (arch, kind, flags) == (None, None, 0)
            if machine and machine not in self.machines:
                raise QemuRefused(f"the machine '{machine}' is not supported by emulator '{emulator}'")
            return f"<domainCapabilities>\n  <path>{emulator or self.emulator}</path>\n</domainCapabilities>"

        return work(SimpleNamespace(getDomainCapabilities=capabilities, getVersion=lambda: self.version))

    async def aside(self, domain: str, deed: str, work: object, timeout_s: float = 0) -> None:  # noqa: ARG002
        await self._pass(deed)
        if deed == "ended it":
            await self.end()

    async def monitor_commands(self, domain: str, what: str, messages: list[str], timeout_s: float) -> list[str]:  # noqa: ARG002
        await self._pass(what)
        return ['{"return": {"status": "running"}}' for _ in messages]

    async def create(self, domain: str) -> None:
        await self._pass("create")
        if why := await self.hook("prepare", self.carried):
            raise QemuRefused(f"libvirt has not started it: {why}", vm=domain)
        await self.run()

    # -- what it does by itself ---------------------------------------------------------------------------------------

    async def _pass(self, step: str) -> None:
        self.passed.append(step)
        if act := self.steps.get(step):
            await act()

    async def hook(self, operation: str, xml: str = "") -> str:
        request = HookRequest(operation, "begin", "web1", xml, pid=self.room.hook_pid)
        return await self.room.world.desk.on_request(request)

    async def run(self) -> None:
        """From a yes in ``prepare`` to the guest that runs. Raises QemuRefused."""
        await self._pass("qemu")
        places, loads = self.room.world.places, bool(self.carried)
        words = ("-name", "guest=web1", self.memory or str(places.gate("web1")), str(self.offset), str(PAGES))
        status = "inmigrate" if loads else "prelaunch"
        self.qemu = await asyncio.create_subprocess_exec(
            sys.executable,
            *(str(QEMU), *words, str(places.monitor("web1")), status),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.room.host.pid_file("web1").write_text(str(self.qemu.pid))
        self.tell("begin")
        listening = asyncio.create_task(self._listen())
        ended = asyncio.create_task(self.qemu.wait())
        try:
            capabilities = asyncio.create_task(self._until_answered("qmp_capabilities"))
            await asyncio.wait({capabilities, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await self._go(ended, loads=loads)
            if ended.done():
                raise QemuRefused("libvirt has not started it: process exited while connecting to monitor", vm="web1")
        finally:
            listening.cancel()

    async def _go(self, ended: asyncio.Task[int], *, loads: bool) -> None:
        if not loads:
            self.tell("resume")
        else:
            await asyncio.wait(
                {asyncio.create_task(self._until_answered("migrate-set-capabilities")), ended},
                return_when=asyncio.FIRST_COMPLETED,
            )
            self.tell(f"status {self.room.restored_as}")
        await self._pass("restored")
        if ended.done():
            return
        if why := await self.hook("started", self.carried):
            await self.end()
            raise QemuRefused(f"libvirt has not started it: {why}", vm="web1")
        await self._pass("yes")
        if loads and not ended.done() and self.room.restored_as == "paused":
            self.tell("resume")

    async def _listen(self) -> None:
        assert self.qemu
        assert self.qemu.stdout
        while line := await self.qemu.stdout.readline():
            async with self._said:
                self.said.append(json.loads(line))
                self._said.notify_all()

    async def _until_answered(self, command: str) -> None:
        async with self._said:
            await self._said.wait_for(lambda: command in self.commands)

    @property
    def commands(self) -> list[str]:
        return [one["execute"] for one in self.said]

    @property
    def capability(self) -> list[bool]:
        """How x-ignore-shared was set, in order."""
        sets = [one for one in self.said if one["execute"] == "migrate-set-capabilities"]
        return [one["arguments"]["capabilities"][0]["state"] for one in sets]

    def tell(self, line: str) -> None:
        assert self.qemu
        assert self.qemu.stdin
        self.qemu.stdin.write(f"{line}\n".encode())

    async def end(self) -> None:
        if self.qemu and self.qemu.returncode is None:
            self.qemu.kill()
            await self.qemu.wait()
        self.room.host.pid_file("web1").unlink(missing_ok=True)
        await self.hook("release")


class Room:
    """web1, and all around it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places, self.host = Places(root / "run"), LibvirtPaths(root)
        for path in (self.places.run, self.host.images, self.host.pid_file("x").parent, self.host.settings.parent):
            path.mkdir(parents=True, exist_ok=True)
        self.host.settings.write_text(f'user = "+{os.geteuid()}"\n')
        self.ram = root / "web1.ram"
        self.ram.write_bytes(bytes(PAGES))
        located = in_file(self.ram)
        self.launch = launch(memory=(located.identity,), nodes=(located.node,), memory_fds=(), sockets={})
        self.image = self.host.image("web1")
        self.image.write_bytes(b"an image")
        self.reads = Reads()
        self.reads.mark_unread(self.image)
        self.image.read_bytes()
        self.hook_pid = 0
        self.restored_as = "paused"
        self.notes, self.gate = Notes(), Gates(self.places)
        self.arrived: Callable[[str], Awaitable[None]] = self._refuse
        self.background: set[asyncio.Future[None]] = set()
        self.libvirt = FakeLibvirt(self)
        self.world = self.new_agent()

    def new_agent(self) -> World:
        async def arrive(domain: str, checkpoint: str) -> None:  # noqa: ARG001
            await self.arrived(checkpoint)

        def spawn(work: Any) -> None:
            self.background.add(asyncio.ensure_future(work))

        desk = Desk(arrive, lambda xml: xml, lambda start, request: allow(world, start, request), self.gate.close, print)
        world = World(
            libvirt=self.libvirt,  # type: ignore[arg-type]  # a fake
            desk=desk,
            gate=self.gate,  # type: ignore[arg-type]  # likewise
            places=self.places,
            host=self.host,
            records=self.notes,
            open_memory=self._open,
            checkpoint_of=lambda xml: xml,
            images=None,  # type: ignore[arg-type]  # nothing is saved here
            reads=self.reads,
            own_monitors={},
            spawn=spawn,
            is_saved=lambda _: False,
        )
        self.world = world
        return world

    async def _refuse(self, checkpoint: str) -> None:
        raise QemuFailed(f"not now, {checkpoint}", vm="web1")

    def _open(self, node: str, identity: MemoryIdentity) -> int:  # noqa: ARG002 - it was proved
        return os.open(node, os.O_RDWR | os.O_CLOEXEC)

    @property
    def place(self) -> DomainPlace:
        return DomainPlace("web1", self.world)

    @property
    def for_load(self) -> Launch:
        return replace(self.launch, kind="load", checkpoint="id-1")

    async def loaded(self) -> DomainQemu:
        """A QEMU in which libvirt has restored the image, and waits for the agent."""
        self.libvirt.carried = "id-1"
        await self.place.start(self.for_load)
        qemu = await self.place.connect(PATIENCE_S)
        assert isinstance(qemu, DomainQemu)
        await qemu.load(-1, PATIENCE_S)
        return qemu


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """Its hook is a child of a shell that stands for libvirt's daemon, and has no file open."""
    with subprocess.Popen(["sh", "-c", "tail -f /dev/null & echo $!; wait"], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout
        room = Room(tmp_path)
        room.hook_pid = int(daemon.stdout.readline())
        yield room
        os.kill(room.hook_pid, signal.SIGKILL)


def run(room: Room, work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await work()
        finally:
            await room.libvirt.end()
            for own in room.world.own_monitors.values():
                await own.close()
            await asyncio.gather(*room.background, return_exceptions=True)

    asyncio.run(bounded())


# -- a start ---------------------------------------------------------------------------------------------------------------


def test_a_domain_starts_and_its_way_to_the_memory_is_closed_again(room: Room) -> None:
    async def work() -> None:
        await room.place.start(room.launch)
        assert not room.gate.is_open("web1")
        assert room.libvirt.capability == []
        qemu = await room.place.connect(PATIENCE_S)
        assert await qemu.run_state() is RunState.RUNNING
        recorded = room.notes.launches["web1"]
        assert recorded.argv[2:4] == ("-name", "guest=web1"), "its command line is libvirt's"
        assert room.world.desk.start_of("web1") is None

    run(room, work)


def test_the_memory_can_be_reached_only_between_the_questions(room: Room) -> None:
    seen: list[tuple[str, bool]] = []

    async def look(step: str) -> None:
        seen.append((step, room.gate.is_open("web1")))

    async def work() -> None:
        for step in ("create", "qemu"):
            room.libvirt.steps[step] = lambda step=step: look(step)  # type: ignore[misc]
        await room.place.start(room.launch)
        await look("after")

    run(room, work)
    assert seen == [("create", False), ("qemu", True), ("after", False)]


def test_an_image_of_another_checkpoint_is_refused_before_there_is_a_qemu(room: Room) -> None:
    async def work() -> None:
        room.libvirt.carried = "id-9"
        with pytest.raises(QemuFailed, match="has the state of checkpoint id-9, and the agent allows checkpoint id-1"):
            await room.place.start(room.for_load)
        assert room.libvirt.qemu is None
        assert not room.gate.is_open("web1")

    run(room, work)


def test_a_start_afresh_restores_no_checkpoint(room: Room) -> None:
    async def work() -> None:
        room.libvirt.carried = "id-1"
        with pytest.raises(QemuFailed, match="the agent allows none"):
            await room.place.start(room.launch)

    run(room, work)


def test_an_image_that_libvirt_has_not_read_is_not_the_one_that_it_restores(room: Room) -> None:
    room.reads.mark_unread(room.image)

    async def work() -> None:
        room.libvirt.carried = "id-1"
        with pytest.raises(QemuFailed, match="another image is restored"):
            await room.place.start(room.for_load)

    run(room, work)


def test_a_qemu_with_other_memory_ends(room: Room) -> None:
    other = room.root / "other"
    other.write_bytes(bytes(PAGES))

    async def work() -> None:
        room.libvirt.memory = str(other)
        with pytest.raises(QemuFailed, match="does not have the memory"):
            await room.place.start(room.launch)
        assert room.libvirt.qemu
        assert await room.libvirt.qemu.wait() == -signal.SIGKILL

    run(room, work)


def test_only_its_qemu_may_connect_to_the_agent(room: Room) -> None:
    async def stranger() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(room.places.monitor("web1")))
            connection.setblocking(False)  # noqa: FBT003 - the library's
            assert await asyncio.get_running_loop().sock_recv(connection, 1) == b"", "it was not hung up on"

    async def work() -> None:
        room.libvirt.steps["qemu"] = stranger
        await room.place.start(room.launch)
        assert await (await room.place.connect(PATIENCE_S)).run_state() is RunState.RUNNING

    run(room, work)


def test_what_libvirt_says_of_a_qemu_that_fails_is_told(room: Room) -> None:
    async def work() -> None:
        room.libvirt.memory = "/nothing/there"
        with pytest.raises(QemuFailed, match="process exited while connecting"):
            await room.place.start(room.launch)
        room.libvirt.memory = ""
        await room.place.start(room.launch)  # and the next one is none the worse

    run(room, work)


def test_a_start_of_somebody_else_is_the_act_s_own(room: Room) -> None:
    async def act(checkpoint: str) -> None:
        assert checkpoint == ""
        await room.place.start(room.launch)

    async def work() -> None:
        room.arrived = act
        assert await room.libvirt.hook("prepare") == ""
        await room.libvirt.run()
        assert "create" not in room.libvirt.passed
        assert await (await room.place.connect(PATIENCE_S)).run_state() is RunState.RUNNING

    run(room, work)


# -- a load ----------------------------------------------------------------------------------------------------------------


def test_the_capability_is_on_for_the_load_alone(room: Room) -> None:
    async def work() -> None:
        qemu = await room.loaded()
        assert room.libvirt.capability == [True]
        assert "yes" not in room.libvirt.passed
        assert await qemu.cont() > 0
        assert room.libvirt.capability == [True, False]
        assert await qemu.run_state() is RunState.RUNNING

    run(room, work)


def test_a_guest_that_stays_paused_is_settled(room: Room) -> None:
    async def work() -> None:
        room.libvirt.carried, room.restored_as = "id-1", "paused"
        room.libvirt.steps["yes"] = _raise(CprError)  # libvirt lets no paused guest run
        await room.loaded()
        with contextlib.suppress(CprError):
            await room.place.settle()
        assert room.libvirt.capability == [True, False]
        assert "yes" in room.libvirt.passed

    run(room, work)


def _raise(kind: type[CprError]) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise kind("libvirt's daemon has ended")

    return fail


@pytest.mark.parametrize("how", ["another hook says no", "the daemon ends"])
def test_a_guest_that_was_not_let_run_has_certainly_not_run(room: Room, how: str) -> None:
    async def no() -> None:
        await room.libvirt.end()

    async def lost() -> None:
        for listener in room.libvirt.heard.lost:
            listener()
        assert room.libvirt.qemu
        await room.libvirt.qemu.wait()

    async def work() -> None:
        qemu = await room.loaded()
        room.libvirt.steps["yes"] = no if how.startswith("another") else lost
        with pytest.raises(LoadFailed, match="was not let run"):
            await qemu.cont()
        assert room.libvirt.qemu
        assert await room.libvirt.qemu.wait() == -signal.SIGKILL, "nobody else would end it"

    run(room, work)


def test_a_guest_that_runs_is_not_ended_by_the_end_of_the_daemon(room: Room) -> None:
    async def lost() -> None:
        room.libvirt.tell("resume")
        for listener in room.libvirt.heard.lost:
            listener()

    async def work() -> None:
        qemu = await room.loaded()
        room.libvirt.steps["yes"] = lost
        assert await qemu.cont() > 0
        assert room.libvirt.qemu
        assert room.libvirt.qemu.returncode is None

    run(room, work)


def test_a_guest_that_was_started_paused_is_loaded_and_waits(room: Room) -> None:
    """As by ``virsh start --paused``: its owner lets it run."""

    async def suspended() -> None:
        for listener in tuple(room.libvirt.heard.suspended):
            listener("web1")
        await asyncio.Event().wait()

    async def work() -> None:
        qemu = await room.loaded()
        room.libvirt.steps["yes"] = suspended
        assert await qemu.cont() == 0.0
        assert await qemu.run_state() is RunState.PAUSED
        assert room.world.desk.start_of("web1") is None

    run(room, work)


def test_an_act_that_gives_up_ends_the_qemu_and_libvirt_hears_why(room: Room) -> None:
    refusals: list[str] = []

    async def act(checkpoint: str) -> None:
        assert checkpoint == "id-1"
        await room.loaded()
        await room.place.kill()
        raise LoadFailed("has other devices", vm="web1")

    async def work() -> None:
        room.arrived, room.libvirt.carried = act, "id-1"
        assert await room.libvirt.hook("prepare", "id-1") == ""
        try:
            await room.libvirt.run()
        except QemuRefused as error:
            refusals.append(error.what)
        assert room.libvirt.qemu
        await room.libvirt.qemu.wait()

    run(room, work)
    assert "has other devices" in refusals[0]


def test_a_state_that_libvirt_could_not_restore_leaves_no_qemu(room: Room) -> None:
    async def crash() -> None:
        assert room.libvirt.qemu
        room.libvirt.qemu.kill()
        await room.libvirt.qemu.wait()

    async def work() -> None:
        room.libvirt.steps["restored"] = crash
        with pytest.raises((LoadFailed, QemuUnreachable), match="could not restore it|connection to QEMU"):
            await room.loaded()  # it may end while the agent still speaks to it

    run(room, work)


def test_a_hook_that_has_gone_gets_no_yes(room: Room) -> None:
    async def work() -> None:
        room.libvirt.carried = "id-1"
        await room.place.start(room.for_load)
        qemu = await room.place.connect(PATIENCE_S)
        start = room.world.desk.start_of("web1")
        assert start
        (await start.started).give_up()
        with pytest.raises(LoadFailed, match="does not wait for the agent's answer"):
            await qemu.load(-1, PATIENCE_S)

    run(room, work)


# -- a new agent -----------------------------------------------------------------------------------------------------------


def test_a_new_agent_that_is_asked_again_finds_the_guest_stopped_and_lets_it_run(room: Room) -> None:
    async def work() -> None:
        await room.loaded()
        for own in room.world.own_monitors.values():
            await own.close()  # the agent is killed
        room.new_agent()
        never = asyncio.Event()
        room.libvirt.steps["what it was asked"] = room.libvirt.steps["query-status"] = never.wait  # type: ignore[assignment]
        asked = asyncio.create_task(room.libvirt.hook("started", "id-1"))
        qemu = await room.place.connect(PATIENCE_S)
        assert await qemu.run_state() is RunState.PAUSED
        del room.libvirt.steps["query-status"]
        going = asyncio.create_task(qemu.cont())
        assert await asked == ""
        event = MonitorEvent("web1", "RESUME", asyncio.get_running_loop().time(), "")
        for listener in tuple(room.libvirt.heard.monitor):
            listener(event._replace(at=_now()))
        assert await going > 0
        assert room.libvirt.passed[-1] == "forgotten its checkpoint" or "migrate-set-capabilities" in room.libvirt.passed

    run(room, work)


def test_a_new_agent_that_repeats_the_load_ends_at_once_what_libvirt_was_to_let_run(room: Room) -> None:
    async def work() -> None:
        await room.loaded()
        for own in room.world.own_monitors.values():
            await own.close()  # the agent is killed
        room.new_agent()
        never = asyncio.Event()
        room.libvirt.steps["query-status"] = never.wait  # type: ignore[assignment]
        asked = asyncio.create_task(room.libvirt.hook("started", "id-1"))
        qemu = await room.place.connect(PATIENCE_S)
        await qemu.quit()
        assert await room.place.wait_exit(0.0)
        assert room.world.desk.start_of("web1") is None, "the load that is repeated has one of its own"
        assert "given it up" in await asked

    run(room, work)


def _now() -> float:
    import time

    return time.time()


def test_a_qemu_that_was_let_go_of_is_asked_by_libvirt(room: Room) -> None:
    async def work() -> None:
        await room.place.start(room.launch)
        await (await room.place.connect(PATIENCE_S)).close()
        qemu = await room.place.connect(PATIENCE_S)
        assert await qemu.run_state() is RunState.RUNNING
        assert room.libvirt.passed.count("query-status") == 2, "one to see that it is there"

    run(room, work)


def test_a_capability_that_an_agent_has_left_on_goes_off(room: Room) -> None:
    """It was killed between that and the save."""

    async def work() -> None:
        await room.place.start(room.launch)
        await (await room.place.connect(PATIENCE_S)).close()
        await room.place.connect(PATIENCE_S)
        assert room.libvirt.passed[-1] == "migrate-set-capabilities"

    run(room, work)


# -- at boot ---------------------------------------------------------------------------------------------------------------


def test_a_domain_that_libvirt_starts_by_itself_as_it_comes_is_the_act_s_own(room: Room) -> None:
    """Its daemon answers nobody before it has started them all."""

    async def work() -> None:
        awaited, coming = asyncio.Event(), asyncio.Event()

        async def there(timeout_s: float) -> None:  # noqa: ARG001
            awaited.set()
            await coming.wait()

        room.libvirt.until_there = there  # type: ignore[method-assign]
        starting = asyncio.create_task(room.place.start(room.launch))
        await awaited.wait()
        assert await room.libvirt.hook("prepare") == ""
        await room.libvirt.run()
        await starting
        assert "create" not in room.libvirt.passed

    run(room, work)


def test_a_start_that_meets_another_one_is_none_the_worse(room: Room) -> None:
    async def other() -> None:
        assert await room.libvirt.hook("prepare") == ""
        await room.libvirt.run()
        raise QemuRefused("libvirt has not started it: the domain is already running", vm="web1")

    async def work() -> None:
        room.libvirt.steps["create"] = other
        await room.place.start(room.launch)
        assert await (await room.place.connect(PATIENCE_S)).run_state() is RunState.RUNNING

    run(room, work)


def test_a_domain_that_somebody_else_has_started_and_ended_is_not_started_once_more(room: Room) -> None:
    """libvirt notes only then that the QEMU before had ended."""

    async def work() -> None:
        waiting, off = asyncio.Event(), asyncio.Event()

        async def until_off() -> None:
            waiting.set()
            await off.wait()

        room.libvirt.steps["until off"] = until_off
        starting = asyncio.create_task(room.place.start(room.launch))
        await waiting.wait()
        start = room.world.desk.start_of("web1")
        assert start
        assert start.creating
        assert await room.libvirt.hook("prepare") == ""
        await room.libvirt.run()
        await starting
        await room.libvirt.end()
        off.set()
        await start.creating
        assert "create" not in room.libvirt.passed

    run(room, work)


def test_a_start_that_was_given_up_is_refused_when_its_question_comes_late(room: Room) -> None:
    async def work() -> None:
        called, late = asyncio.Event(), asyncio.Event()

        async def create() -> None:
            called.set()
            await late.wait()

        room.libvirt.steps["create"] = create
        starting = asyncio.create_task(room.place.start(room.launch))
        await called.wait()
        starting.cancel()
        await asyncio.wait({starting})
        start = room.world.desk.start_of("web1")
        assert start
        assert start.creating
        late.set()
        with pytest.raises(QemuRefused, match="given up"):
            await start.creating
        assert room.libvirt.qemu is None
        assert room.world.desk.start_of("web1") is None

    run(room, work)


# -- the QEMU of the next start --------------------------------------------------------------------------------------------


def test_another_program_of_libvirt_s_default_is_known_by_its_machines_and_its_version(room: Room) -> None:
    was = QemuFacts(version="10.0.2 (Debian 1:10.0.2+ds-2)", machine_type="pc-q35-10.0", dialect="libvirt")

    async def lacks(emulator: str = room.launch.base_argv[0]) -> list[str]:
        return [one.what for one in await room.place.lacks(replace(room.launch, base_argv=(emulator,)), was)]

    async def work() -> None:
        assert await lacks() == []
        room.libvirt.version = 11_001_000
        assert await lacks() == []
        room.libvirt.version = 10_000_001
        assert await lacks() == ["version of QEMU"]
        assert await lacks("/opt/qemu") == [], "libvirt does not tell"
        room.libvirt.machines = {"pc-q35-9.2"}
        assert await lacks() == ["machine type"]

    run(room, work)
