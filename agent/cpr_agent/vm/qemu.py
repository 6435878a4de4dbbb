# SPDX-License-Identifier: GPL-2.0-or-later
"""One live QEMU; implements core.ports.Qemu."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent import vm
from cpr_agent.core.model import Difference, DiskIdentity, Inventory, Launch, PluggedDevice, QemuFacts, RunState, Throttle
from cpr_agent.core.run_states import SAVEABLE
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import GuestAgentFailed, LoadFailed, QemuEnded, QemuFailed, QemuRefused, QemuUnreachable, SaveFailed
from cpr_agent.handles import socket_at, uid_of
from cpr_agent.vm import devices, facts, inventory
from cpr_agent.vm.cmdline import CPR_SOCKET, MAIN_SOCKET, listening_sockets, transfer_address
from cpr_agent.vm.dialects import CprReboot, CprSave, Dialect, choose, choose_migration, fdset, with_cause
from cpr_agent.vm.qmp import Event, Qmp, SocketQmp
from cpr_agent.vm.replies import MIGRATION, STATUS
from cpr_agent.vm.retry import poll_until

_NO_TRANSFER = "this QEMU has no cpr-transfer (10.0 and newer have)"
_WOULD_WAKE = "this QEMU (before 9.0) would wake it by saving"
_CHECK_S = 5.0
"""How long a check waits for a guest agent."""
_ENDED = ("completed", "failed", "cancelled")
_GONE_S = 2.0
"""The end of a connection is known a moment after a command has failed by it."""
_LET_GO_S = 2.0
"""A migration that has failed lets go of its guest within milliseconds, or never: see ``_free``."""
_LOCKS_S = 0.5
"""A guest waits."""
_FREE_S = 3.0
"""For disks that can't be flushed. Other guests may stand until then; whoever acts tries again later."""
_SETTLE_S = 30.0
"""After MIGRATION says completed, the run state follows within milliseconds; this is for a host in trouble."""


class LiveQemu:
    """See core.ports.Qemu. Built by a Runner once the sockets accept.

    ``launch`` and ``pid`` are the agent's own record of it: paths come from there, and none from QEMU.
    """

    def __init__(self, qmp: Qmp, launch: Launch | None = None, pid: int = 0) -> None:
        self._qmp = qmp
        self._launch = launch
        self._pid = pid
        self._dialect: Dialect | None = None
        self._prepared: Dialect | None = None
        """The one for which QEMU has been told capabilities and mode, on this connection."""
        self._transfers: bool | None = None
        self._places = inventory.Places()
        self._version = ""
        self._lasting: QemuFacts | None = None
        self._resumed = False
        """Whether its guest has begun to run since this connection, or since the last save, began."""
        self._nowhere = ""
        """The address of a file that is read by nobody; "" until it is needed."""
        self._stands_in = ""
        """The run state of a guest that did not run when it was saved, where the save changes no run state (CprSave)."""
        qmp.on_event(self._hear)

    @classmethod
    async def connect(cls, vm: str, path: Path, timeout_s: float, launch: Launch | None = None, pid: int = 0) -> LiveQemu:
        """Also set the capabilities and the mode of a save, by which QEMU names all of its blockers: later questions change
        nothing."""
        began = asyncio.get_running_loop().time()
        qemu = cls(await SocketQmp.connect(vm, path, timeout_s, pid), launch, pid)
        try:
            async with asyncio.timeout_at(began + timeout_s):
                await qemu._prepare_once()
        except TimeoutError:
            await qemu.close()
            raise QemuUnreachable(f"QEMU did not answer within {timeout_s:.0f} s", vm=vm) from None
        except BaseException:
            await qemu.close()
            raise
        return qemu

    async def _prepare_once(self) -> None:
        """A QEMU that refuses, which one in the middle of a migration does, says why when it is asked for its blockers."""
        with contextlib.suppress(QemuFailed):
            await self._prepare()

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._qmp.on_event(callback)

    # -- questions ------------------------------------------------------------------------------------------------------

    async def run_state(self) -> RunState:
        status = (await self._qmp.ask(STATUS)).status
        if status == self._stands_in and not self._resumed:
            return RunState.POSTMIGRATE
        if status == CprSave.saved_as and isinstance(await self.dialect(), CprSave):
            return RunState.POSTMIGRATE
        return RunState(status)

    def _hear(self, event: str) -> None:
        """QEMU tells of RESUME before the guest runs (system/cpus.c), on this connection before all that comes after."""
        self._resumed = self._resumed or event == "RESUME"

    async def dialect(self) -> Dialect:
        if self._dialect is None:
            self._dialect = await choose(self._qmp)
        return self._dialect

    async def version(self) -> str:
        if not self._version:
            self._version = await facts.version_of(self._qmp)
        return self._version

    async def facts(self, launch: Launch) -> QemuFacts:
        if self._lasting is None:
            self._lasting = found = await facts.lasting(self._qmp, launch, await self.version())
        else:  # CPUs can be plugged
            cpu = replace(self._lasting.cpu, count=await facts.cpu_count(self._qmp))
            found = replace(self._lasting, cpu=cpu)
        dialect = (await self.dialect()).name
        return replace(found, dialect=dialect, disks=(), firmware=facts.firmware(launch))

    async def differences(self, was: QemuFacts, launch: Launch) -> list[Difference]:
        self._version, self._lasting, found = await facts.machine_differences(self._qmp, was, launch)
        return [*found, *await facts.remote_disk_differences(self._qmp, was)]

    async def lacks(self, was: QemuFacts) -> list[Difference]:
        return facts.older(was.version, await self.version()) + await facts.missing_machine_type(self._qmp, was)

    async def disks(self) -> list[DiskIdentity]:
        return await facts.disks(self._qmp)

    @property
    def pid(self) -> int:
        return self._pid

    async def inventory(self) -> Inventory:
        return await inventory.whole(self._qmp, self._places)

    async def parts(self) -> Inventory:
        return await inventory.parts(self._qmp)

    async def throttle(self, some: Iterable[Throttle]) -> None:
        await inventory.throttle(self._qmp, some)

    async def brief_inventory(self) -> Inventory:
        return await inventory.brief(self._qmp)

    async def listening(self) -> list[str]:
        return list(self._sockets().values())

    def _sockets(self) -> dict[str, str]:
        return listening_sockets(self._launch.argv) if self._launch else {}

    async def blocked_reasons(self, launch: Launch) -> list[str]:
        """All reasons that QMP can tell. Changes nothing in QEMU."""
        await self.dialect()
        status, reasons = await vm.blockers.save_blockers(self._qmp, launch)
        if status == RunState.SUSPENDED and not await self._keeps_suspended():
            reasons.insert(0, f"the guest is suspended, and {_WOULD_WAKE}")
        return reasons

    async def until_saveable(self, launch: Launch, timeout_s: float) -> list[str]:
        return await poll_until(lambda: self.blocked_reasons(launch), lambda reasons: not reasons, timeout_s, slowest_s=1.0)

    async def _keeps_suspended(self) -> bool:
        """No schema tells; measured up to 7.2 and from 10.0, and read in between."""
        newer = facts.numbers(await self.version()) >= facts.numbers("9.0")
        return newer and (await self.dialect()).keeps_suspended

    # -- save and load --------------------------------------------------------------------------------------------------

    async def save(self, vmstate_fd: int, timeout_s: float, checkpoint: str) -> float:  # noqa: ARG002 - QEMU knows of none
        """See the port. Raises SaveFailed; the guest then runs on by itself, or needs ``cont``: ask ``run_state``."""
        vm = self._qmp.vm
        await self._prepare()  # another client may have changed the mode since
        with self._qmp.expecting("STOP") as stopped:
            dialect, was = await self.dialect(), await self.run_state()
            self._resumed, self._stands_in = False, ""
            give_up = self._cancel_migration if was is RunState.RUNNING else self._cancel_unless_ending
            ended = await self._migrate(dialect.save, vmstate_fd, timeout_s, give_up)
            if ended != "completed":
                await uninterrupted(self._let_go_of())
                raise SaveFailed(f"QEMU could not write its state: {await self._why(ended)}", vm=vm)
            if dialect.synchronous and was not in (RunState.RUNNING, RunState.SUSPENDED):
                self._stands_in = was
            state = await uninterrupted(poll_until(self.run_state, lambda now: now is RunState.POSTMIGRATE, _SETTLE_S))
            if state is not RunState.POSTMIGRATE:
                raise SaveFailed(f"QEMU wrote its state but is {state}, not postmigrate", vm=vm)
            return stopped.result().at if stopped.done() else 0.0

    async def has_saved(self) -> bool:
        if (await self.dialect()).synchronous:
            return await self.run_state() is RunState.POSTMIGRATE
        return await self._migration_status() == "completed"

    async def load_runs_guest(self, saved_as: str = "") -> bool:
        return (await self._reader(saved_as)).load_runs_guest

    async def _reader(self, saved_as: str) -> Dialect:
        """A QEMU with cpr-load can read what one without it has saved, but not by cpr-load."""
        dialect = await self.dialect()
        other = isinstance(dialect, CprSave) and saved_as not in ("", CprSave.name)
        return await choose_migration(self._qmp) if other else dialect

    async def load(self, vmstate_fd: int, timeout_s: float, saved_as: str = "") -> float:
        """See the port. Raises LoadFailed, QemuFailed; this QEMU is of no use afterwards."""
        dialect = self._dialect = await self._reader(saved_as)
        if self._prepared is not dialect:  # a QEMU that another client has told otherwise since refuses the state
            await self._prepare()
        if dialect.load_runs_guest:
            return await self._load_and_run(dialect, vmstate_fd)
        await self._loaded(dialect.load, vmstate_fd, timeout_s)
        return 0.0

    async def _load_and_run(self, dialect: Dialect, fd: int) -> float:
        """A QEMU that has ended, and has not told of RESUME before, has not run its guest."""
        with self._qmp.expecting("RESUME") as resumed:
            try:
                await dialect.load(self._qmp, fd)
            except QemuFailed as error:
                if not self._resumed and await self._never_ran():
                    raise LoadFailed(f"QEMU could not read the state: {error.what}", vm=self._qmp.vm) from error
                raise
            return (await self._time_of(resumed, "resume the guest")) if self._resumed else 0.0

    async def _never_ran(self) -> bool:
        """False where nobody can tell."""
        try:
            return await self.run_state() is RunState.INMIGRATE
        except QemuFailed:
            return await poll_until(self._is_gone, bool, _GONE_S) and not self._resumed

    async def _is_gone(self) -> bool:
        return self._qmp.gone

    async def _prepare(self) -> None:
        dialect = await self.dialect()
        await dialect.prepare(self._qmp)
        self._prepared = dialect

    async def _loaded(self, act: Callable[[Qmp, int], Awaitable[None]], fd: int, timeout_s: float) -> None:
        ended = await self._migrate(act, fd, timeout_s)
        if ended != "completed":
            raise LoadFailed(f"QEMU could not read the state: {await self._why(ended)}", vm=self._qmp.vm)
        state = await poll_until(self.run_state, lambda now: now is not RunState.INMIGRATE, _SETTLE_S)
        # It runs if another client has sent `cont` before: the caller spends the checkpoint at once.
        if state not in SAVEABLE:
            raise LoadFailed(f"QEMU read the state but is {state}, not paused", vm=self._qmp.vm)

    async def _migrate(
        self,
        act: Callable[[Qmp, int], Awaitable[None]],
        fd: int,
        timeout_s: float,
        give_up: Callable[[], Awaitable[None]] | None = None,
    ) -> str:
        """Start ``act`` and wait for its end; statuses that are not known count as under way: later QEMUs add some.
        ``give_up`` is for a caller who is cancelled, and cancels the migration if it is not given."""
        with self._qmp.expecting("MIGRATION", lambda event: event.status in _ENDED) as end:
            try:
                await act(self._qmp, fd)
                if (await self.dialect()).synchronous:
                    return "completed"
                async with asyncio.timeout(timeout_s):
                    return (await asyncio.shield(end)).status
            except TimeoutError:
                await uninterrupted(self._cancel_migration())
                return f"it was not done within {timeout_s:.0f} s and was cancelled"
            except asyncio.CancelledError:
                await uninterrupted((give_up or self._cancel_migration)())
                raise

    async def _let_go_of(self) -> None:
        """Wait until a migration that has ended lets go of the guest: before, QEMU refuses ``cont``."""
        await poll_until(self.run_state, lambda now: now is not RunState.FINISH_MIGRATE, _LET_GO_S)

    async def _free(self) -> None:
        """Bring a guest to postmigrate that a failed migration has left in finish-migrate. Raises QemuRefused.

        QEMU 10.0 and 11.1 do so when the disks can't be flushed at the guest's stop (migration_connect in
        migration/migration.c starts it again in no case), and refuse ``cont`` there. A migration that ends well leads out;
        its state goes nowhere. It has the mode of a save, in which QEMU notes the run state first: one that fails in
        another mode would set a run state that it never noted, and abort.
        """
        await self._let_go_of()
        if await self.run_state() is not RunState.FINISH_MIGRATE or not isinstance(await self.dialect(), CprReboot):
            return
        if problem := await poll_until(self._migrate_to_nowhere, lambda why: not why, _FREE_S, slowest_s=1.0):
            raise QemuRefused(f"QEMU can't flush its disks: {problem}", vm=self._qmp.vm)

    async def _migrate_to_nowhere(self) -> str:
        """Returns why it failed."""
        await self._prepare()
        if not self._nowhere:
            with _write_only_memory() as fd:
                self._nowhere = f"file:{await fdset(self._qmp, fd)}"
        try:
            ended = await self._migrate(lambda qmp, _: qmp.execute("migrate", {"uri": self._nowhere}), -1, _SETTLE_S)
        except QemuRefused as error:  # for one, the failed migration is not over yet
            return error.what
        if ended != "completed":
            return await self._why(ended)
        await poll_until(self.run_state, lambda now: now is RunState.POSTMIGRATE, _SETTLE_S)
        return ""

    async def _cancel_migration(self) -> None:
        """Returns when none is under way: it would stop the guest after the caller has looked whether it runs. For
        ``uninterrupted``."""
        await self._qmp.execute("migrate_cancel")
        status = await poll_until(self._migration_status, lambda now: now in ("none", *_ENDED), _SETTLE_S)
        if status not in ("none", *_ENDED):
            raise QemuFailed(f"QEMU did not cancel its migration within {_SETTLE_S:.0f} s", vm=self._qmp.vm)
        await self._let_go_of()

    async def _cancel_unless_ending(self) -> None:
        """For a guest that stood still before. A migration that is cancelled as it ends leaves it in postmigrate without a
        state that another QEMU could read (migration_iteration_finish in migration/migration.c), and nothing leads back to
        where it was. Nobody waits for this guest, and its state is written within milliseconds."""
        await poll_until(self._migration_status, lambda now: now in ("none", *_ENDED), _LET_GO_S)
        await self._cancel_migration()

    async def _migration_status(self) -> str:
        return (await self._qmp.ask(MIGRATION)).status

    async def _why(self, ended: str) -> str:
        try:
            return with_cause((await self._qmp.ask(MIGRATION)).error_desc) or ended
        except QemuFailed:
            return ended

    # -- from one QEMU to another ---------------------------------------------------------------------------------------

    async def transfer_problem(self) -> str:
        dialect = await self._transferring()
        if dialect is None:
            return _NO_TRANSFER
        await self._prepare_transfer()
        reasons = (await self._qmp.ask(MIGRATION)).blocked_reasons
        if reasons:
            await self._prepare()
        return "; ".join(reasons)

    @contextlib.asynccontextmanager
    async def handing_over(
        self, directory: str, taker_lives: Callable[[], Awaitable[bool]], timeout_s: float
    ) -> AsyncIterator[Callable[[], Awaitable[float]]]:
        await self._prepare_transfer()
        with self._qmp.expecting("STOP") as stopped:

            async def handed_over() -> float:
                status = await poll_until(self._migration_status, lambda now: now in _ENDED, timeout_s)
                state = await self.run_state()
                if (status, state) != ("completed", RunState.POSTMIGRATE):
                    why = await self._why(status)
                    raise SaveFailed(f"QEMU did not hand its guest over, and is {state}: {why}", vm=self._qmp.vm)
                return (await stopped).at

            try:
                await self._offer(directory, taker_lives, timeout_s)
                yield handed_over
            except BaseException:
                await uninterrupted(self._withdraw_offer())
                raise

    async def _offer(self, directory: str, taker_lives: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Again while no QEMU listens yet, for which there is no event. Raises QemuFailed."""
        channels = [_channel("main", MAIN_SOCKET, directory), _channel("cpr", CPR_SOCKET, directory)]

        async def offer() -> str:
            try:
                await self._qmp.execute("migrate", {"channels": channels})
            except QemuRefused as error:
                if not await taker_lives():
                    raise QemuEnded("the new QEMU has ended", vm=self._qmp.vm) from error
                return error.what
            return ""

        if refused := await poll_until(offer, lambda refusal: not refusal, timeout_s):
            raise QemuFailed(f"the new QEMU was not there within {timeout_s:.0f} s: {refused}", vm=self._qmp.vm)

    async def _withdraw_offer(self) -> None:
        await self._cancel_migration()
        await self._prepare_once()

    async def withdraw(self) -> None:
        if await self._migration_status() not in ("none", *_ENDED):
            await self._withdraw_offer()

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
        self._prepared = None
        await dialect.prepare_transfer(self._qmp)

    # -- the guest ------------------------------------------------------------------------------------------------------

    async def cont(self) -> float:
        with self._qmp.expecting("RESUME") as resumed:
            try:
                await self._let_run()
            except QemuRefused:  # as in finish-migrate; whoever asks first makes each guest wait for that
                if await self.run_state() is not RunState.FINISH_MIGRATE:
                    raise
                await self._free()
                await self._let_run()
            state = await self.run_state()
            if state is RunState.SUSPENDED or (state is RunState.RUNNING and not resumed.done()):
                return 0.0  # QEMU tells of no RESUME where another client has let the guest run before
            return await self._time_of(resumed, "resume the guest")

    async def _let_run(self) -> None:
        if refused := await poll_until(self._refused_a_lock, lambda error: error is None, _LOCKS_S):
            raise refused

    async def _refused_a_lock(self) -> QemuRefused | None:
        """That of a QEMU which has just been killed lasts until the kernel has closed the files of its io_uring."""
        try:
            await self._qmp.execute("cont")
        except QemuRefused as error:
            if "lock" not in error.what:
                raise
            return error
        return None

    async def wake(self) -> float:
        with self._qmp.expecting("WAKEUP") as awake:
            if await self.run_state() is not RunState.SUSPENDED:
                return 0.0
            await self._qmp.execute("system_wakeup")
            return await self._time_of(awake, "wake the guest")

    async def _time_of(self, event: asyncio.Future[Event], deed: str) -> float:
        try:
            async with asyncio.timeout(_SETTLE_S):
                return (await event).at
        except TimeoutError:
            raise QemuFailed(f"QEMU did not {deed} within {_SETTLE_S:.0f} s", vm=self._qmp.vm) from None

    async def set_guest_clock(self, now: Callable[[], float]) -> float | None:
        path = await self._guest_agent()
        if path is None:
            return None
        with self._at(path) as address:
            return await vm.guest_agent.set_clock(self._qmp.vm, address, now)

    async def vfio_devices(self, some: Sequence[PluggedDevice]) -> list[str]:
        return await devices.vfio_devices(self._qmp, some)

    async def sleep_problem(self) -> str:
        if not await self._keeps_suspended():
            return _WOULD_WAKE
        if problem := await devices.wake_problem(self._qmp):
            return problem
        path = await self._guest_agent()
        if path is None:
            return f"it has no guest agent (no virtio-serial port {vm.guest_agent.PORT} at a Unix socket)"
        try:
            with self._at(path) as address:
                if not await vm.guest_agent.offers(self._qmp.vm, address, "guest-suspend-ram", _CHECK_S):
                    return "its guest agent does not let guest-suspend-ram be used"
        except GuestAgentFailed as error:
            return f"{error.what}; start, or restart, qemu-guest-agent in the guest"
        return ""

    async def suspend(self, timeout_s: float) -> float:
        path = await self._guest_agent()
        if path is None:
            raise GuestAgentFailed("it has no guest agent", vm=self._qmp.vm)
        # Once it was asked to, a guest has to be seen to sleep, or not to: else it is not known how it could be woken.
        return await uninterrupted(self._fall_asleep(path, timeout_s))

    async def _fall_asleep(self, path: Path, timeout_s: float) -> float:
        with self._qmp.expecting("SUSPEND") as asleep:
            try:
                with self._at(path) as address:
                    await vm.guest_agent.suspend(self._qmp.vm, address, asleep, timeout_s)
            except GuestAgentFailed:
                # A Linux that sleeps without S3 (s2idle) is running for QEMU, and is woken by its keyboard.
                with contextlib.suppress(QemuRefused):
                    await self._qmp.execute("send-key", {"keys": [{"type": "qcode", "data": "shift"}]})
                raise
            return asleep.result().at

    async def _guest_agent(self) -> Path | None:
        """Where the VM's guest agent port is by the command line. Which character device has it QEMU may say."""
        sockets = self._sockets()
        name = await devices.chardev_of_port(self._qmp, vm.guest_agent.PORT) if sockets else ""
        return Path(sockets[name]) if name in sockets else None

    @contextlib.contextmanager
    def _at(self, path: Path) -> Iterator[Path]:
        """Where to connect to the socket that this QEMU made at ``path``. Raises GuestAgentFailed."""
        with contextlib.ExitStack() as stack:
            try:
                address = stack.enter_context(socket_at(path, uid_of(self._pid)))
            except OSError as error:
                what = f"its guest agent's socket {path}: {error.strerror}"
                raise GuestAgentFailed(what, vm=self._qmp.vm) from error
            yield Path(address)

    async def powerdown(self) -> None:
        if await self.run_state() is RunState.SUSPENDED:
            await self._qmp.execute("system_wakeup")
        await self._qmp.execute("system_powerdown")

    async def quit(self) -> None:
        await self._qmp.quit()

    async def close(self) -> None:
        await self._qmp.close()


@contextlib.contextmanager
def _write_only_memory() -> Iterator[int]:
    """QEMU 10.0 takes no other descriptor to write to."""
    memory = os.memfd_create("cpr-nowhere")
    try:
        fd = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY)
    finally:
        os.close(memory)
    try:
        yield fd
    finally:
        os.close(fd)


def _channel(kind: str, name: str, directory: str) -> dict[str, Any]:
    """A MigrationChannel of QAPI."""
    return {"channel-type": kind, "addr": transfer_address(Path(directory) / name)}
