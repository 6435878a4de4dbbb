"""One live QEMU; implements core.ports.Qemu."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import CpuFacts, Difference, DiskIdentity, FileDigest, Launch, QemuFacts
from cpr_agent.errors import GuestAgentFailed, LoadFailed, QemuFailed, SaveFailed
from cpr_agent.vm import guest_agent
from cpr_agent.vm.cmdline import CPR_SOCKET, MAIN_SOCKET, cpu_model, firmware_files, transfer_address
from cpr_agent.vm.dialects import CONFLICTING, CprReboot, CprSave, Dialect, choose
from cpr_agent.vm.qmp import Event, Qmp, QmpRefused, event_time
from cpr_agent.vm.retry import until

_NO_TRANSFER = "this QEMU has no cpr-transfer (10.0 and newer have)"
_WOULD_WAKE = "this QEMU (before 9.0) would wake it by saving"
_CHECK_S = 5.0
"""How long a check waits for a guest agent."""
_ENDED = ("completed", "failed", "cancelled")
_SETTLE_S = 30.0
"""After MIGRATION says completed, the run state follows within milliseconds; this is for a host in trouble."""


class LiveQemu:
    """See core.ports.Qemu. Built by a Runner once the sockets accept."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._dialect: Dialect | None = None
        self._transfers: bool | None = None
        self._version = ""

    @classmethod
    async def connect(cls, vm: str, path: Path, timeout_s: float) -> LiveQemu:
        return cls(await Qmp.connect(vm, path, timeout_s))

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._qmp.on_event(callback)

    async def run_state(self) -> str:
        status = str((await self._qmp.execute("query-status"))["status"])
        if status == CprSave.saved_as and isinstance(await self.dialect(), CprSave):
            return "postmigrate"
        return status

    async def dialect(self) -> Dialect:
        if self._dialect is None:
            self._dialect = await choose(self._qmp)
        return self._dialect

    async def facts(self, launch: Launch) -> QemuFacts:
        cpu = await self._cpu()
        return QemuFacts(
            version=await self.version(),
            machine_type=await self._machine_type(),
            dialect=(await self.dialect()).name,
            cpu=replace(cpu, features=await self._features(launch)) if cpu.words else cpu,
            tpm=await self._tpm(),
            firmware=tuple(FileDigest(path=path, sha256="") for path in firmware_files(launch.argv)),
        )

    async def differences(self, was: QemuFacts, launch: Launch) -> list[Difference]:
        # A guest waits for this: all at once.
        version, machine, tpm, cpu = await asyncio.gather(self.version(), self._machine_type(), self._tpm(), self._cpu())
        out = _older(was.version, version)
        if machine != was.machine_type:
            out.append(Difference("machine type", was.machine_type, machine))
        if tpm != was.tpm:
            out.append(Difference("TPM", ", ".join(was.tpm) or "none", ", ".join(tpm) or "none"))
        if was.cpu.count and cpu.count != was.cpu.count:
            out.append(Difference("number of CPUs", str(was.cpu.count), str(cpu.count)))
        if gone := _gone(was.cpu.words, cpu.words):
            out.append(Difference("CPU features", await self._named(gone, was.cpu, launch), "they are gone"))
        if remote := [disk for disk in was.disks if disk.kind == "remote"]:
            # Node names that QEMU makes up are others each time.
            now = {(disk.driver, disk.filename): str(disk.size_bytes) for disk in await self.disks()}
            out += [
                Difference(f"{disk.filename}: size_bytes", str(disk.size_bytes), size)
                for disk in remote
                if (size := now.get((disk.driver, disk.filename), "missing")) != str(disk.size_bytes)
            ]
        return out

    async def lacks(self, was: QemuFacts) -> list[Difference]:
        out = _older(was.version, await self.version())
        machines = {machine["name"] for machine in await self._qmp.execute("query-machines")}
        if was.machine_type not in machines:
            out.append(Difference("machine type", was.machine_type, "not among its types"))
        return out

    async def version(self) -> str:
        if not self._version:
            version = await self._qmp.execute("query-version")
            number = version["qemu"]
            package = f" ({version['package']})" if version["package"] else ""
            self._version = f"{number['major']}.{number['minor']}.{number['micro']}{package}"
        return self._version

    async def _machine_type(self) -> str:
        machine = await self._qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        return str(machine).removesuffix("-machine")

    async def _cpu(self) -> CpuFacts:
        """Of the first CPU, by what the guest's CPUID shows; all are the same model."""
        cpus = await self._qmp.execute("query-cpus-fast")
        words = await self._optional("qom-get", [], path=cpus[0]["qom-path"], property="feature-words")
        named = {
            f"{word['cpuid-input-eax']:X}.{word.get('cpuid-input-ecx', 0):X}.{word['cpuid-register']}": int(
                word["features"]
            )
            for word in words
        }
        return CpuFacts(count=len(cpus), words={name: bits for name, bits in named.items() if bits})

    async def _features(self, launch: Launch) -> tuple[str, ...]:
        model = cpu_model(launch.argv)
        expanded = await self._optional("query-cpu-model-expansion", {}, type="full", model=model)
        props = expanded.get("model", {}).get("props", {})
        return tuple(sorted(name for name, value in props.items() if value is True))

    async def _named(self, gone: dict[str, int], was: CpuFacts, launch: Launch) -> str:
        """By what QEMU took off the model, and by what the model has no more; the bits where neither knows."""
        cpus = await self._qmp.execute("query-cpus-fast")
        taken = await self._optional("qom-get", [], path=cpus[0]["qom-path"], property="unavailable-features")
        names = {*taken} & {*was.features} | {*was.features} - {*await self._features(launch)}
        bits = ", ".join(f"CPUID {word} {value:#x}" for word, value in gone.items())
        return f"{', '.join(sorted(names))} ({bits})" if names else bits

    async def _tpm(self) -> tuple[str, ...]:
        found = await self._optional("query-tpm", [])
        return tuple(f"{tpm['id']} {tpm['model']} {tpm['options']['type']}" for tpm in found)

    async def blocked_reasons(self, launch: Launch) -> list[str]:
        """Everything DESIGN.md names that QMP can tell. Setting the migration mode is how QEMU is made to say more."""
        dialect = await self.dialect()
        reasons: list[str] = []
        state = await self.run_state()
        if state == "suspended" and not await self._keeps_suspended():
            reasons.append(f"the guest is suspended, and {_WOULD_WAKE}")
        reasons += await self._memory_reasons(launch)
        capabilities = {c["capability"]: c["state"] for c in await self._qmp.execute("query-migrate-capabilities")}
        reasons += [f"the migration capability {name} is on" for name in CONFLICTING if capabilities.get(name)]
        if (await self._qmp.execute("query-replay"))["mode"] != "none":
            reasons.append("QEMU records or replays the guest (-icount rr=), which a save would break")
        if (await self._optional("query-colo-status", {"mode": "none"}))["mode"] != "none":
            reasons.append("the VM is part of a COLO pair")
        jobs = [str(job["id"]) for job in await self._qmp.execute("query-jobs")]
        reasons += [f"block or snapshot job {job} is running" for job in jobs]
        migration = await self._qmp.execute("query-migrate")
        if migration.get("status") in ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling"):
            reasons.append("a migration is already under way")
        else:
            await dialect.prepare(self._qmp)
            migration = await self._qmp.execute("query-migrate")
            reasons += [str(reason) for reason in migration.get("blocked-reasons", ())]
        return reasons

    async def until_saveable(self, launch: Launch, timeout_s: float) -> list[str]:
        return await until(lambda: self.blocked_reasons(launch), lambda reasons: not reasons, timeout_s, slowest_s=1.0)

    async def _memory_reasons(self, launch: Launch) -> list[str]:
        """RAM that a save would lose or copy: private, unnamed, or freed by a clean exit."""
        backends = await self._qmp.execute("query-memdev")
        sizes = {one.object_id: one.size_bytes for one in launch.memory}
        there = {backend.get("id") for backend in backends}
        reasons = [f"its RAM is not in the memory backend {name}" for name in sizes if name not in there]
        for backend in backends:
            name = backend.get("id", "?")
            if not backend.get("share"):
                reasons.append(f"memory backend {name} is private (share=off): all of it would go to the state file")
                continue
            path = f"/objects/{name}"
            kind = await self._optional("qom-get", "", path=path, property="type")
            if kind != "memory-backend-file":
                reasons.append(f"memory backend {name} has no name outside QEMU ({kind}): it would die with QEMU")
            elif name not in sizes:
                reasons.append(f"memory backend {name} is not one that the agent put there and can prove")
            elif await self._optional("qom-get", False, path=path, property="discard-data"):
                reasons.append(f"memory backend {name} has discard-data=on: QEMU would free the RAM when it exits")
            elif backend.get("size") != sizes[name]:
                reasons.append(f"memory backend {name} has {backend.get('size')} bytes, not {sizes[name]}")
        return reasons

    async def save(self, vmstate_fd: int, timeout_s: float) -> float:
        """See the port. Raises SaveFailed; the guest then runs on by itself, or needs ``cont``: ask ``run_state``."""
        vm = self._qmp.vm
        dialect = await self.dialect()
        with self._qmp.expecting(lambda event: event["event"] == "STOP") as stopped:
            ended = await self._migrate(dialect.save, vmstate_fd, timeout_s)
            if ended != "completed":
                raise SaveFailed(f"QEMU could not write its state: {await self._why(ended)}", vm=vm)
            state = await until(self.run_state, lambda now: now == "postmigrate", _SETTLE_S)
            if state != "postmigrate":
                raise SaveFailed(f"QEMU wrote its state but is {state}, not postmigrate", vm=vm)
            return event_time(stopped.result()) if stopped.done() else 0.0

    async def load(self, vmstate_fd: int, timeout_s: float) -> None:
        """See the port. Raises LoadFailed, QemuFailed; this QEMU is of no use afterwards."""
        dialect = await self.dialect()
        await dialect.prepare(self._qmp)
        await self._loaded(dialect.load, vmstate_fd, timeout_s)

    async def _loaded(self, act: Callable[[Qmp, int], Any], fd: int, timeout_s: float) -> None:
        ended = await self._migrate(act, fd, timeout_s)
        if ended != "completed":
            raise LoadFailed(f"QEMU could not read the state: {await self._why(ended)}", vm=self._qmp.vm)
        state = await until(self.run_state, lambda now: now != "inmigrate", _SETTLE_S)
        if state not in ("paused", "suspended"):
            raise LoadFailed(f"QEMU read the state but is {state}, not paused", vm=self._qmp.vm)

    async def transfer_problem(self) -> str:
        dialect = await self._transferring()
        if dialect is None:
            return _NO_TRANSFER
        await dialect.prepare_transfer(self._qmp)
        reasons = (await self._qmp.execute("query-migrate")).get("blocked-reasons", ())
        if reasons:
            await dialect.prepare(self._qmp)
        return "; ".join(map(str, reasons))

    @contextlib.asynccontextmanager
    async def handing_over(
        self, directory: str, taker_lives: Callable[[], Awaitable[bool]], timeout_s: float
    ) -> AsyncIterator[Callable[[], Awaitable[float]]]:
        await self._prepare_transfer()
        channels = [_channel("main", MAIN_SOCKET, directory), _channel("cpr", CPR_SOCKET, directory)]

        async def offer() -> str:
            """Again while nobody listens yet, for which there is no event."""
            try:
                await self._qmp.execute("migrate", {"channels": channels})
            except QmpRefused as error:
                if not await taker_lives():
                    raise QemuFailed("the new QEMU has ended", vm=self._qmp.vm) from error
                return error.what
            return ""

        with self._qmp.expecting(lambda event: event["event"] == "STOP") as stopped:

            async def handed_over() -> float:
                status = await until(self._migration_status, lambda now: now in _ENDED, timeout_s)
                state = await self.run_state()
                if (status, state) != ("completed", "postmigrate"):
                    why = await self._why(status)
                    raise SaveFailed(f"QEMU did not hand its guest over, and is {state}: {why}", vm=self._qmp.vm)
                return event_time(await stopped)

            if refused := await until(offer, lambda refusal: not refusal, timeout_s):
                raise QemuFailed(f"the new QEMU was not there within {timeout_s:.0f} s: {refused}", vm=self._qmp.vm)
            try:
                yield handed_over
            except BaseException:
                await asyncio.shield(asyncio.ensure_future(self._cancel_migration()))
                raise

    async def withdraw(self) -> None:
        if await self._migration_status() not in ("none", *_ENDED):
            await self._cancel_migration()

    async def take_over(self, directory: str, timeout_s: float) -> None:
        await self._prepare_transfer()
        where: dict[str, object] = {"channels": [_channel("main", MAIN_SOCKET, directory)]}
        await self._loaded(lambda qmp, _: qmp.execute("migrate-incoming", where), -1, timeout_s)

    async def _transferring(self) -> CprReboot | None:
        """Its dialect, if that transfers."""
        dialect = await self.dialect()
        if not isinstance(dialect, CprReboot):
            return None
        if self._transfers is None:
            self._transfers = await dialect.transfers(self._qmp)
        return dialect if self._transfers else None

    async def _prepare_transfer(self) -> None:
        dialect = await self._transferring()
        if dialect is None:
            raise QemuFailed(_NO_TRANSFER, vm=self._qmp.vm)
        await dialect.prepare_transfer(self._qmp)

    async def _migrate(self, act: Callable[[Qmp, int], Any], fd: int, timeout_s: float) -> str:
        """Start ``act`` and wait for its end; statuses that are not known count as under way (FACTS.md)."""

        def ended(event: Event) -> bool:
            return event["event"] == "MIGRATION" and event["data"]["status"] in _ENDED

        with self._qmp.expecting(ended) as end:
            try:
                await act(self._qmp, fd)
                if (await self.dialect()).synchronous:
                    return "completed"
                async with asyncio.timeout(timeout_s):
                    return str((await asyncio.shield(end))["data"]["status"])
            except TimeoutError:
                await self._cancel_migration()
                return f"it was not done within {timeout_s:.0f} s and was cancelled"
            except asyncio.CancelledError:
                await asyncio.shield(asyncio.ensure_future(self._cancel_migration()))
                raise

    async def _cancel_migration(self) -> None:
        """Returns when none is under way: it would stop the guest after the caller has looked whether it runs."""
        await self._qmp.execute("migrate_cancel")
        status = await until(self._migration_status, lambda now: now in ("none", *_ENDED), _SETTLE_S)
        if status not in ("none", *_ENDED):
            raise QemuFailed(f"QEMU did not cancel its migration within {_SETTLE_S:.0f} s", vm=self._qmp.vm)

    async def _migration_status(self) -> str:
        return str((await self._qmp.execute("query-migrate")).get("status", "none"))

    async def _why(self, ended: str) -> str:
        try:
            info = await self._qmp.execute("query-migrate")
        except QemuFailed:
            return ended
        return str(info.get("error-desc") or ended)

    async def cont(self) -> float:
        with self._qmp.expecting(lambda event: event["event"] == "RESUME") as resumed:
            await self._qmp.execute("cont")
            if await self.run_state() == "suspended":
                return 0.0
            try:
                async with asyncio.timeout(_SETTLE_S):
                    return event_time(await resumed)
            except TimeoutError:
                raise QemuFailed(f"QEMU did not resume the guest within {_SETTLE_S:.0f} s", vm=self._qmp.vm) from None

    async def set_guest_clock(self, now: Callable[[], float]) -> float | None:
        path = await self._guest_agent()
        return await guest_agent.set_clock(self._qmp.vm, path, now) if path else None

    async def vfio_devices(self) -> list[str]:
        devices = [(path.rpartition("/")[2], kind) for path, kind in await self._devices() if kind.startswith("vfio-")]
        if not devices:
            return []
        places = {
            device["qdev_id"]: device for bus in await self._optional("query-pci", []) for device in _pci(bus["devices"])
        }
        found = []
        for name, kind in devices:
            place = "at {bus:02x}:{slot:02x}.{function:x}".format(**places[name]) if name in places else ""
            found.append(f"{name} ({' '.join(filter(None, (kind, place)))})")
        return found

    async def sleep_problem(self) -> str:
        if not await self._keeps_suspended():
            return _WOULD_WAKE
        if not (await self._optional("query-current-machine", {})).get("wakeup-suspend-support"):
            return "its machine has no way to wake a guest that sleeps"
        if await self._s3_is_disabled():
            return "its machine has no S3 (disable_s3): its kernel would sleep in a way of its own, which QEMU can't see"
        path = await self._guest_agent()
        if path is None:
            return f"it has no guest agent (no virtio-serial port {guest_agent.PORT} at a Unix socket)"
        try:
            if not await guest_agent.offers(self._qmp.vm, path, "guest-suspend-ram", _CHECK_S):
                return "its guest agent does not let guest-suspend-ram be used"
        except GuestAgentFailed as error:
            return f"{error.what}; start, or restart, qemu-guest-agent in the guest"
        return ""

    async def suspend(self, timeout_s: float) -> float:
        path = await self._guest_agent()
        if path is None:
            raise GuestAgentFailed("it has no guest agent", vm=self._qmp.vm)
        with self._qmp.expecting(lambda event: event["event"] == "SUSPEND") as asleep:
            try:
                await guest_agent.suspend(self._qmp.vm, path, asleep, timeout_s)
            except GuestAgentFailed:
                # A Linux that sleeps without S3 (s2idle) is running for QEMU, and is woken by its keyboard.
                await self._optional("send-key", None, keys=[{"type": "qcode", "data": "shift"}])
                raise
            return event_time(asleep.result())

    async def wake(self) -> float:
        with self._qmp.expecting(lambda event: event["event"] == "WAKEUP") as awake:
            if await self.run_state() != "suspended":
                return 0.0
            await self._qmp.execute("system_wakeup")
            try:
                async with asyncio.timeout(_SETTLE_S):
                    return event_time(await awake)
            except TimeoutError:
                raise QemuFailed(f"QEMU did not wake the guest within {_SETTLE_S:.0f} s", vm=self._qmp.vm) from None

    async def _keeps_suspended(self) -> bool:
        """No schema tells; measured up to 7.2 and from 10.0, and read in between (FACTS.md, "Run states")."""
        return (await self.dialect()).keeps_suspended and _numbers(await self.version()) >= _numbers("9.0")

    async def _s3_is_disabled(self) -> bool:
        """By a property of the chipset's power management, which is part of the south bridge on newer QEMUs' ``pc``;
        ``wakeup-suspend-support`` is true all the same (measured on 10.0)."""
        onboard = await self._devices("/machine/unattached")
        places = [path for path, kind in onboard if kind in ("ICH9-LPC", "PIIX4_PM")]
        places += [f"{path}/pm" for path, kind in onboard if kind.startswith("PIIX3")]
        return any([(await self._optional("qom-get", 0, path=path, property="disable_s3")) for path in places])

    async def _devices(self, *parents: str) -> list[tuple[str, str]]:
        """QOM path and type of each device there; by default of those that the command line or a hotplug has made."""
        return [
            (f"{parent}/{child['name']}", child["type"].removeprefix("child<").removesuffix(">"))
            for parent in parents or ("/machine/peripheral", "/machine/peripheral-anon")
            for child in await self._qmp.execute("qom-list", {"path": parent})
        ]

    async def _guest_agent(self) -> Path | None:
        """The socket of the VM's guest agent port."""
        sockets = {
            name: Path(found[1])
            for name, at in (await self._chardevs()).items()
            if (found := re.search(r"unix:([^,]*)", at))
        }
        for path, kind in await self._devices() if sockets else ():
            if kind != "virtserialport":
                continue
            if await self._optional("qom-get", "", path=path, property="name") == guest_agent.PORT:
                return sockets.get(await self._optional("qom-get", "", path=path, property="chardev"))
        return None

    async def listening(self) -> list[str]:
        found = [re.search(r"unix:([^,]*),.*server=on", at) for at in (await self._chardevs()).values()]
        return [match[1] for match in found if match]

    async def _chardevs(self) -> dict[str, str]:
        """What they are connected to, by their names; the agent's own aside."""
        chardevs = {str(chardev["label"]): str(chardev["filename"]) for chardev in await self._qmp.execute("query-chardev")}
        return {name: at for name, at in chardevs.items() if not name.startswith("cpr-")}

    async def powerdown(self) -> None:
        if await self.run_state() == "suspended":
            await self._qmp.execute("system_wakeup")
        await self._qmp.execute("system_powerdown")

    async def quit(self) -> None:
        await self._qmp.quit()

    async def close(self) -> None:
        await self._qmp.close()

    async def _optional(self, command: str, absent: Any, **arguments: object) -> Any:
        """The answer of a command or property that this QEMU may lack."""
        try:
            return await self._qmp.execute(command, arguments or None)
        except QmpRefused:
            return absent

    async def disks(self) -> list[DiskIdentity]:
        return [
            DiskIdentity(
                node=str(node.get("node-name", "")),
                driver=str(node.get("drv", "")),
                filename=str(node.get("file", "")),
                size_bytes=int(node.get("image", {}).get("virtual-size", 0)),
            )
            for node in await self._qmp.execute("query-named-block-nodes", {"flat": True})
        ]


def _pci(devices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """These, and what is behind them if they are bridges."""
    for device in devices:
        yield device
        yield from _pci(device.get("pci_bridge", {}).get("devices", []))


def _channel(kind: str, name: str, directory: str) -> dict[str, Any]:
    """A MigrationChannel of QAPI."""
    return {"channel-type": kind, "addr": transfer_address(Path(directory) / name)}


def _older(was: str, now: str) -> list[Difference]:
    if _numbers(now) >= _numbers(was):
        return []
    return [Difference("version of QEMU", f"{was} (the same or newer is good)", now)]


def _numbers(version: str) -> tuple[int, ...]:
    """``10.0.2 (Debian 1:10.0.2+ds-2)`` as (10, 0, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("(")[0])[:3])


def _gone(was: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """The bits of each word that were set, and are not."""
    return {word: missing for word, bits in was.items() if (missing := bits & ~now.get(word, 0))}
