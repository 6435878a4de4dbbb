# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-agentd: wires the layers together, and runs until a signal ends it or the bus is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cpr_agent import __version__, core, vm
from cpr_agent.bus.presence import Presence
from cpr_agent.bus.service import Service
from cpr_agent.core import acts, upgrade
from cpr_agent.core.manager import Manager
from cpr_agent.core.ports import Ports, Runner
from cpr_agent.core.settings import Settings
from cpr_agent.core.threads import Threads
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.errors import CprError, InvalidDefinition
from cpr_agent.files import locked, make_private_directory, write_atomically
from cpr_agent.host.firmware import KeptFirmware
from cpr_agent.host.hooks import HookDirectory
from cpr_agent.host.journald import LogControl
from cpr_agent.host.kernels import InstalledKernels
from cpr_agent.host.kexec import NoKexec, SystemdKexec
from cpr_agent.host.processes import ProcessRunner
from cpr_agent.host.programs import KeptPrograms
from cpr_agent.host.runner import Programs, RunFiles, make_run_directories
from cpr_agent.host.systemd import Systemd, SystemdRunner, booted, notify, watchdog_interval_s
from cpr_agent.host.this_host import ThisHost
from cpr_agent.host.units import NoUnits, SystemdUnits
from cpr_agent.host.users import Users
from cpr_agent.memory.backends import HostMemory
from cpr_agent.memory.devices import UdevDevices
from cpr_agent.memory.opening import open_memory
from cpr_agent.report.publisher import Publisher, Write
from cpr_agent.store.checkpoints import CheckpointStore
from cpr_agent.store.history import History
from cpr_agent.store.journal import FileJournal
from cpr_agent.store.schema import read_launch
from cpr_agent.vm import launch
from cpr_agent.vm.definition import DefinitionDirectory, decode_toml, read_admins_file
from cpr_agent.vm.qemu import LiveQemu
from cpr_agent.words import counted

if TYPE_CHECKING:
    import argparse

    from cpr_agent.domains.hub import Domains

log = logging.getLogger("cpr_agent")


LOGS_S = 10.0
"""Between two looks at the size of logs."""
BOOT_S = 10.0
"""From READY until what no boot needs is imported: guests are loaded by then, or wait for devices."""
PROGRAMS = Programs(LiveQemu.connect, read_launch, open_memory, launch.TICKET, launch.__file__)


class Paths(msgspec.Struct, frozen=True):
    """The agent's directories and files. Tests, and agents without privileges, have a ``root`` other than /."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "etc/cpr-agent/agent.toml"

    @property
    def definitions(self) -> Path:
        return self.root / "etc/cpr-agent/vms"

    @property
    def hooks(self) -> Path:
        return self.root / "etc/cpr-agent/hooks.d"

    @property
    def metrics(self) -> Path:
        """Debian's node_exporter reads from here (prometheus-node-exporter, --collector.textfile.directory)."""
        return self.root / "var/lib/prometheus/node-exporter"

    @property
    def motd(self) -> Path:
        """pam_motd(8) shows the files in here."""
        return self.root / "run/motd.d"

    @property
    def state(self) -> Path:
        return self.root / "var/lib/cpr-agent"

    @property
    def programs(self) -> Path:
        """Not in /run, which Debian mounts noexec; nor below /var/lib/cpr-agent, which QEMU's user can't enter."""
        return self.root / "var/cache/cpr-agent/programs"

    @property
    def firmware(self) -> Path:
        """Likewise."""
        return self.root / "var/cache/cpr-agent/firmware"

    @property
    def run(self) -> Path:
        return self.root / "run/cpr-agent"

    @property
    def logs(self) -> Path:
        return self.root / "var/log/cpr-agent"


def build(
    paths: Paths, settings: Settings, systemd: Systemd | None, store: CheckpointStore | None = None
) -> tuple[Manager, Domains | None]:
    """The agent without its bus; and libvirt's domains on a host that has libvirt, which are to be opened once their VMs
    are known. ``store`` is another than the one in ``paths``."""
    host = ThisHost(systemd.userspace_at, systemd.soft_reboots) if systemd else ThisHost()
    files = RunFiles(paths.run, paths.logs, PROGRAMS)
    users = Users(paths.state / "users")
    threads = Threads()
    exports = tuple(Path(directory) for directory in settings.files.directories)
    ports = Ports(
        definitions=DefinitionDirectory(paths.definitions, paths.run, paths.logs),
        runner=SystemdRunner(files, systemd, users, threads) if systemd else ProcessRunner(files),
        memory=HostMemory(UdevDevices()),
        store=store or CheckpointStore(paths.state / "checkpoints", exports),
        journal=FileJournal(paths.state / "journal", host, host),
        history=History(paths.state / "history"),
        hooks=HookDirectory(paths.hooks, settings.hooks.timeout),
        clock=host,
        boot=host,
        files=host,
        sockets=host,
        threads=threads,
        programs=KeptPrograms(paths.programs),
        firmware=KeptFirmware(paths.firmware),
        kernels=InstalledKernels(),
        kexec=SystemdKexec(systemd, paths.run, paths.state) if systemd else NoKexec(),
        units=SystemdUnits(systemd) if systemd else NoUnits(),
    )
    if not (paths.root / "etc/libvirt/qemu").is_dir():  # libvirt makes it; guests wait for what is imported
        return Manager(ports, settings), None
    from cpr_agent.domains.wiring import with_domains

    records = RunFiles(paths.run / "domains", paths.logs, PROGRAMS)
    ports, domains = with_domains(ports, paths.root, paths.run, records, files.grants, open_memory)
    manager = Manager(ports, settings)
    domains.attach(manager.arrive, manager.look_again, manager.reload)
    return manager, domains


def publisher(paths: Paths, settings: Settings, manager: Manager) -> Publisher:
    """Raises InvalidDefinition."""
    wanted = settings.report.metrics
    if wanted not in ("auto", "off") and not Path(wanted).is_absolute():
        what = f'{paths.config}: report.metrics is "{wanted}", which is neither "auto" nor "off" nor an absolute path'
        raise InvalidDefinition(what)
    directory = paths.metrics if wanted == "auto" else paths.root / wanted.lstrip("/")
    metrics = None if wanted == "off" or (wanted == "auto" and not directory.is_dir()) else directory / "cpr-agent.prom"
    motd = paths.motd / "50-cpr-agent" if settings.report.motd and paths.motd.is_dir() else None
    return Publisher(manager, _written_to(metrics) if metrics else None, _written_to(motd) if motd else None)


def _written_to(path: Path) -> Write:
    def write(text: str) -> None:
        if text:
            write_atomically(path, text.encode(), mode=0o644, durable=False)
        else:
            path.unlink(missing_ok=True)

    return write


def _settings(path: Path) -> Settings:
    """Raises InvalidDefinition, OSError."""
    return decode_toml(path, Settings, read_admins_file(path)) if path.exists() else Settings()


async def serve(paths: Paths, address: str | None, runner: str, logs: LogControl) -> int:
    settings = _settings(paths.config)
    kind = settings.agent.runner if runner == "auto" else runner
    systemd = Systemd() if kind == "systemd" or (kind == "auto" and booted()) else None
    make_private_directory(paths.state)
    with locked(paths.state / "lock"):  # an agent on another bus could have the same guests
        make_run_directories(paths.run)
        manager, domains = build(paths, settings, systemd)
        published = publisher(paths, settings, manager)
        manager.listeners.add(published)
        presence = Presence(
            manager,
            address,
            lambda bus: Service(bus, manager, paths.run, logs),
            lambda: systemd is None or systemd.use_bus(),
        )
        early = systemd is not None and systemd.booting() and manager.ports.boot.booted_by_kexec()
        if not early and (why := await presence.come()):  # before anything is touched: there must be no second agent
            log.warning("%s", why)
        return await _serve(presence, manager, domains, published, Start(paths.run, units=systemd is not None, early=early))


class Start(msgspec.Struct, frozen=True):
    """``run`` is the agent's directory in /run. ``units``: systemd runs the VMs. ``early``: guests that a kexec has saved
    wait, and nothing that they do not need is waited for."""

    run: Path
    units: bool
    early: bool


async def _serve(presence: Presence, manager: Manager, domains: Domains | None, published: Publisher, start: Start) -> int:
    await manager.read_definitions()
    await manager.expect_recovery()
    if domains:
        domains.open()
    presence.open()

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: manager.jobs.start("reload", lambda _: manager.reload()))
    gc.freeze()  # these objects stay: a collection while a guest stands still need not look at them
    gc.enable()
    known = counted(len(manager.vms), "VM")
    log.info("cpr-agentd %s: %s, run as %s", __version__, known, "units" if start.units else "processes")
    notify(ready=1, status=known)

    watchdog = loop.create_task(_feed_watchdog())
    trimming = loop.create_task(_trim_logs(manager.ports.runner))
    recovering = loop.create_task(_recover(manager, early=start.early))
    importing = loop.create_task(_import_late())
    first = {recovering, importing} if start.early else {recovering}
    listing = loop.create_task(_list_machines(presence, manager, first, start))
    publishing = loop.create_task(published.run())
    published.wake()
    stopping = loop.create_task(stop.wait())
    lost = loop.create_task(presence.stay())
    await asyncio.wait({stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        # End like a killed agent, which recovery is made for: without the bus no act under way can be undone in order.
        log.error("the connection to the bus was lost")
        sys.stderr.flush()
        os._exit(1)
    notify(stopping=1)
    await manager.close()  # an act under way waits for libvirt's hook
    if domains:
        await domains.close()
    recovering.cancel()
    importing.cancel()
    listing.cancel()
    publishing.cancel()
    watchdog.cancel()
    trimming.cancel()
    lost.cancel()
    return 0


async def _recover(manager: Manager, *, early: bool) -> None:
    """After READY: no other unit waits for a QEMU that does not answer."""
    began = time.monotonic()
    try:
        await manager.recover(early=early)
        if manager.ledger.phase is not Phase.BOOTED:  # else guests are to be loaded now
            await asyncio.to_thread(manager.ports.history.all)
            for vm in manager.vms.values():
                manager.listeners.vm_changed(vm)
    except Exception:
        log.exception("the recovery failed")
    log.info("recovered %s in %.1f s", counted(len(manager.vms), "VM"), time.monotonic() - began)


async def _list_machines(presence: Presence, manager: Manager, first: set[asyncio.Task[None]], start: Start) -> None:
    """With systemd-machined, after ``first`` and once there is a bus. No module of it is imported while guests wait."""
    if not start.units:
        return
    await asyncio.wait(first)
    bus = await presence.bus()
    from cpr_agent.bus.machined import Machined
    from cpr_agent.core.machines import Machines
    from cpr_agent.host.leaders import UnitLeaders

    try:
        await Machines(manager, Machined(bus), UnitLeaders(start.run / "tickets")).run()
    except Exception:
        log.exception("systemd-machined hears no more of VMs")


async def _import_late() -> None:
    """What no boot needs (ADR 27), before an upgrade of the package puts another version in its place. A caller that comes
    waits for one module at most. No event tells that a boot is over."""
    await asyncio.sleep(BOOT_S)
    for package in (core, acts, upgrade, vm):
        for name in package.__all__:
            getattr(package, name)
            await asyncio.sleep(0)


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s:
        notify(watchdog=1)
        await asyncio.sleep(interval_s)


async def _trim_logs(runner: Runner) -> None:
    """No event tells that a log has grown."""
    while True:
        await asyncio.sleep(LOGS_S)
        await asyncio.to_thread(runner.trim_logs)


class Options(msgspec.Struct):
    """The options of cpr-agentd's command line."""

    root: Path = Path("/")
    bus_address: str | None = None
    runner: Literal["auto", "systemd", "process"] = "auto"
    debug: bool = False


def arguments() -> argparse.ArgumentParser:
    import argparse  # at boot there are no arguments, and guests wait

    parser = argparse.ArgumentParser(prog="cpr-agentd", description="Keeps QEMU guests alive across a host kexec.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--root", type=Path, help="prefix of all paths (default: /)")
    parser.add_argument("--bus-address", help="D-Bus address (default: the system bus)")
    parser.add_argument("--runner", choices=("auto", "systemd", "process"), help="what runs the VMs")
    parser.add_argument("--debug", action="store_true", help="log more")
    return parser


def main() -> None:
    options = Options()
    if sys.argv[1:]:
        arguments().parse_args(namespace=options)
    logs = LogControl(logging.getLogger(), "debug" if options.debug else "info")
    try:
        status = asyncio.run(serve(Paths(options.root), options.bus_address, options.runner, logs))
    except CprError as error:
        log.error("%s", error)
        status = 1
    except Exception:
        log.exception("cpr-agentd failed")
        status = 1
    logging.shutdown()
    os._exit(status)  # the interpreter's own end waits for threads, of which one may look at storage that does not answer
