# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains beside the agent's own VMs. A host without adopted domains pays for a look into a directory: the rest is loaded
when the first one is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

import msgspec

from cpr_agent.core.model import Definition, Launch, MemoryIdentity
from cpr_agent.core.ports import Store
from cpr_agent.domains.host import LibvirtPaths, is_adopted, qemu_pid, qemus_named
from cpr_agent.domains.names import NAMESPACE, Places
from cpr_agent.errors import CprError, QemuFailed
from cpr_agent.vm.retry import poll_until

if TYPE_CHECKING:
    from cpr_agent.domains.connection import Session
    from cpr_agent.domains.definitions import DomainDefinitions
    from cpr_agent.domains.gate import Grants
    from cpr_agent.domains.hook_server import HookServer
    from cpr_agent.domains.place import Records, World
    from cpr_agent.domains.runner import DomainRunner
    from cpr_agent.domains.saved import DomainCheckpoints

log = logging.getLogger(__name__)

RECONNECT_S = 1.0
"""Between two attempts to reach a libvirt daemon that is away; nothing tells that it is back."""


Arrive = Callable[[str, str], Coroutine[None, None, None]]
LookAgain = Callable[[str], Coroutine[None, None, None]]
Reload = Callable[[], Coroutine[None, None, None]]


class Callbacks(msgspec.Struct):
    """What the domains ask of all VMs."""

    arrive: Arrive
    look_again: LookAgain
    reload: Reload


class Parts(msgspec.Struct, frozen=True):
    """What is handed in. ``open_memory`` opens the RAM at a node, and proves on the descriptor that it is the one."""

    host: LibvirtPaths
    places: Places
    records: Records
    grants: Grants
    store: Store
    open_memory: Callable[[str, MemoryIdentity], int]
    nodes_of: Callable[[Definition], list[str]]
    """The paths of its memory on this host, as far as they are known."""


class Loaded(msgspec.Struct, frozen=True):
    """What there is once a domain was found."""

    world: World
    runner: DomainRunner
    store: DomainCheckpoints
    server: HookServer


class Domains:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._callbacks: Callbacks | None = None
        self._loaded: Loaded | None = None
        self._definitions: DomainDefinitions | None = None
        self._names: set[str] = set()
        self.nodes: dict[str, list[str]] = {}
        """Of each adopted domain, the paths of its memory."""
        self.heard_at = 0.0
        """When libvirt's hook was last heard of (epoch s)."""
        self._serving = False
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, arrive: Arrive, look_again: LookAgain, reload: Reload) -> None:
        """See core.manager.Manager."""
        self._callbacks = Callbacks(arrive, look_again, reload)

    def __contains__(self, name: str) -> bool:
        """Whether this VM is a domain."""
        return name in self._names

    @property
    def definitions(self) -> DomainDefinitions:
        if self._definitions is None:
            from cpr_agent.domains.definitions import DomainDefinitions

            self._definitions = DomainDefinitions(self._parts.host, self._parts.places)
        return self._definitions

    @property
    def runner(self) -> DomainRunner:
        return self._all.runner

    @property
    def store(self) -> DomainCheckpoints:
        return self._all.store

    @property
    def session(self) -> Session:
        """With libvirt, for questions about domains that are not adopted."""
        return self._all.world.libvirt.of("")

    def plain(self, launch: Launch) -> Launch:
        """What of a command line has to be looked after on this host."""
        return self.definitions.without_own(launch) if launch.vm in self else launch

    @property
    def launched_all(self) -> list[str]:
        return self._parts.records.launched_all()

    def is_not_libvirts(self, name: str, user: str) -> bool:
        """Whether a QEMU of this name runs as ``user``, or as the agent itself, that libvirt knows nothing of."""
        pid = qemu_pid(self._parts.host.pid_file(name), name)
        return any(one != pid for one in qemus_named(name, user))

    def load_all(self, is_own: Callable[[str], bool]) -> tuple[dict[str, Definition], dict[str, Exception]]:
        """See core.ports.Definitions. A domain whose definition is gone stays one while it runs or is saved; a name of
        which ``is_own`` says so is none of a domain's."""
        directory = self._parts.host.definitions
        good, bad = self.definitions.load_all() if directory.is_dir() else ({}, {})
        names = {*good, *bad, *self.launched_all, *self._saved(is_own)}
        self._names = {name for name in names if not is_own(name)}
        self.nodes = {name: self._nodes(one) for name, one in good.items() if name in self._names}
        if self._names and self._serving:
            self._open()
        return good, bad

    def _nodes(self, definition: Definition) -> list[str]:
        launch = self._parts.records.launch(definition.name)
        return list(launch.nodes) if launch else self._parts.nodes_of(definition)

    def _saved(self, is_own: Callable[[str], bool]) -> set[str]:
        """libvirt's images in the store: no own VM's launch is without descriptors of its memory."""
        found = set()
        for name in self._parts.store.live_all():
            if is_own(name):
                continue
            with contextlib.suppress(CprError):
                manifest = self._parts.store.live(name)
                if manifest and not manifest.launch.memory_fds:
                    found.add(name)
        return found

    def open(self) -> None:
        """Answer libvirt's hook from now on: the definitions are read, and every act waits for its VM's recovery. Raises
        OSError."""
        self._serving = True
        if self._names:
            self._open()

    async def close(self) -> None:
        if self._loaded:
            await self._loaded.server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _open(self) -> None:
        server = self._all.server
        if server.is_open:
            return
        server.open()
        for name in self._names:
            self._all.store.settle(name)
        self._spawn(self._stay_connected())

    @property
    def _all(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Loaded:
        from cpr_agent.domains import xml
        from cpr_agent.domains.connection import Libvirt
        from cpr_agent.domains.desk import Desk
        from cpr_agent.domains.gate import Gate, qemus_of
        from cpr_agent.domains.hook_server import HookRequest, HookServer
        from cpr_agent.domains.images import Images
        from cpr_agent.domains.place import World, allow
        from cpr_agent.domains.reads import Reads
        from cpr_agent.domains.runner import DomainRunner
        from cpr_agent.domains.saved import DomainCheckpoints

        importlib.import_module("cpr_agent.vm.blockers")  # with what waits for libvirt: a guest may stand then (ADR 27)
        parts, callbacks = self._parts, self._callbacks
        assert callbacks
        parts.places.run.mkdir(parents=True, exist_ok=True)
        gate = Gate(parts.places.gates, parts.grants, lambda: qemus_of(parts.host.pids))
        gate.close_all()
        reads = Reads()
        images = Images(parts.places.run / "domains" / "images", xml.with_checkpoint)

        def found(domain: str) -> None:
            self._spawn(callbacks.look_again(domain))

        desk = Desk(
            callbacks.arrive, xml.checkpoint_of, lambda start, request: allow(world, start, request), gate.close, found
        )
        libvirt = Libvirt()
        world = World(
            libvirt,
            desk,
            gate,
            parts.places,
            parts.host,
            parts.records,
            parts.open_memory,
            xml.checkpoint_of,
            images,
            reads,
            {},
            self._spawn,
            parts.store.checkpointed,
        )

        async def on_request(request: HookRequest) -> str:
            self.heard_at = time.time()
            return await desk.on_request(request)

        store = DomainCheckpoints(parts.store, parts.host, reads, xml.checkpoint_of, images.finish)
        return Loaded(world, DomainRunner(world), store, HookServer(parts.places.hook, on_request))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        async def run() -> None:
            try:
                await work
            except CprError as error:
                log.warning("%s", error.text)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stay_connected(self) -> None:
        """Hear what libvirt tells; whenever it is back, everything is derived anew."""
        callbacks, libvirt = self._callbacks, self._all.world.libvirt
        assert callbacks
        lost = asyncio.Event()
        libvirt.heard.lost.append(lost.set)
        libvirt.heard.lost.append(self._all.world.desk.lost)
        libvirt.heard.defined.append(self._on_definition)
        libvirt.heard.ended.append(self._on_end)
        libvirt.heard.started.append(lambda _: self._all.world.gate.sweep())
        while True:
            lost.clear()
            await poll_until(self._connected, bool, math.inf, slowest_s=RECONNECT_S)
            self._all.world.gate.sweep()
            self._spawn(callbacks.reload())  # what was defined meanwhile nobody tells
            for name in sorted(self._names):
                self._spawn(callbacks.look_again(name))
                if self._all.world.has_loaded(name):  # what was to be done after that may have met no daemon
                    self._spawn(self._all.world.forget_checkpoint(name))
            await lost.wait()
            log.warning("libvirt's daemon has gone; its domains run on")

    def _on_definition(self, domain: str) -> None:
        """Of any domain, adopted or not."""
        callbacks, directory = self._callbacks, self._parts.host.definitions
        assert callbacks
        if domain in self._names or is_adopted(directory / f"{domain}.xml", NAMESPACE.encode()):
            self._spawn(callbacks.reload())

    def _on_end(self, domain: str) -> None:
        """One that was undefined as it ran is gone now."""
        callbacks = self._callbacks
        assert callbacks
        if domain in self._names and not (self._parts.host.definitions / f"{domain}.xml").exists():
            self._spawn(callbacks.reload())

    async def _connected(self) -> bool:
        try:
            await self._all.world.libvirt.watch()
        except QemuFailed as error:
            log.debug("%s", error.what)
            return False
        return True
