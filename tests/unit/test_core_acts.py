# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM's acts, where they go wrong: a guest is neither lost nor run twice, and the caller learns what is left."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Blocked,
    Busy,
    LoadFailed,
    MemoryChanged,
    NoCheckpoint,
    QemuFailed,
    QemuRefused,
    QemuUnreachable,
    SaveFailed,
    WrongState,
)
from tests.bench import Bench
from tests.fakes import Gate

SAVED = ["manifest.json", "vmstate"]
CONSUMED = ["manifest.json.loaded", "vmstate.loaded"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A VM that runs."""
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    return bench


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


async def until_cancelled(gate: Gate, act: Awaitable[object]) -> None:
    """Cancel ``act`` where it waits at the gate."""
    task = asyncio.ensure_future(act)
    await gate.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_save_is_announced_before_and_told_after(bench: Bench) -> None:
    bench.vm(save)
    assert bench.records() == ["start", "save-begin", "saved"]
    assert bench.qemu().status == "postmigrate"
    assert bench.files() == SAVED
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.records()[3:] == ["load-begin", "resume", "resumed"]
    assert bench.qemu().status == "running"
    assert bench.files() == CONSUMED
    assert bench.runner.violations == []


@pytest.mark.parametrize("point", ["save", "after-save"])
def test_a_save_that_fails_lets_the_guest_run_on(bench: Bench, point: str) -> None:
    bench.runner.faults["web1", point] = SaveFailed("no room", vm="web1")
    with pytest.raises(SaveFailed, match="could not be saved: no room. The guest is running, as before; no checkpoint"):
        bench.vm(save)
    assert bench.qemu().status == "running"
    assert bench.files() == []


def test_a_save_that_fails_leaves_a_paused_guest_paused(bench: Bench) -> None:
    """``cont`` would let it run: a new QEMU reads what the old one has written."""
    bench.qemu().by_hand("paused")
    bench.runner.faults["web1", "after-save"] = SaveFailed("no room", vm="web1")
    before = bench.qemu()
    with pytest.raises(SaveFailed, match="could not be saved: no room. The guest is paused, as before; no checkpoint"):
        bench.vm(save)
    assert bench.qemu() is not before
    assert bench.qemu().status == "paused"
    assert bench.files() == []
    bench.vm(lambda vm: vm.resume())
    assert bench.runner.violations == []


@pytest.mark.parametrize("status", ["paused", "suspended"])
def test_a_guest_whose_state_was_not_written_whole_stays_in_its_qemu(bench: Bench, status: str) -> None:
    """QEMU 7.2 says postmigrate all the same: no other QEMU could read what was written (it was lost to a full disk)."""
    bench.qemu().by_hand(status)
    bench.runner.faults["web1", "half-written"] = SaveFailed("no room", vm="web1")
    before = bench.qemu()
    with pytest.raises(SaveFailed, match=rf"The guest was {status}; it stands in its QEMU .* postmigrate now"):
        bench.vm(save)
    assert bench.qemu() is before
    assert bench.files() == []


def test_the_way_on_is_told_for_a_paused_guest_that_its_save_left_in_finish_migrate(bench: Bench) -> None:
    """Its disk can't be flushed: QEMU has written no state, and lets no save begin."""
    qemu = bench.qemu()
    qemu.by_hand("paused")

    async def story(vm: Vm) -> None:
        written = bench.runner.gates["web1", "after-save"] = Gate()
        saving = asyncio.ensure_future(save(vm))
        await written.entered.wait()
        qemu.status = "finish-migrate"
        bench.runner.faults["web1", "after-save"] = SaveFailed("can't flush its disks", vm="web1")
        written.go.set()
        with pytest.raises(SaveFailed, match=r"finish-migrate now. Mend the cause, then `cprctl resume web1` lets it run"):
            await saving
        await vm.resume()
        assert vm.state is VmState.RUNNING

    bench.vm(story)


def test_a_paused_guest_that_its_save_left_standing_can_go_on(bench: Bench) -> None:
    bench.qemu().by_hand("paused")
    bench.runner.faults["web1", "half-written"] = SaveFailed("no room", vm="web1")

    async def fail_and_resume(vm: Vm) -> None:
        with pytest.raises(SaveFailed):
            await save(vm)
        assert vm.state is VmState.PAUSED
        with pytest.raises(WrongState, match="its guest stands where a migration has left it"):
            await save(vm)
        await vm.resume()

    bench.vm(fail_and_resume)
    assert bench.qemu().status == "running"
    bench.runner.faults.clear()
    bench.vm(save)
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.runner.violations == []


def test_a_sleeping_guest_that_its_save_left_standing_is_not_let_run(bench: Bench) -> None:
    """QEMU would abort (measured)."""
    bench.qemu().by_hand("suspended")
    bench.runner.faults["web1", "half-written"] = SaveFailed("no room", vm="web1")
    with pytest.raises(SaveFailed):
        bench.vm(save)
    with pytest.raises(WrongState, match="was asleep when its save failed, and QEMU has no way back for it"):
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize("fault", ["load", "differences", "connect"])
def test_a_paused_guest_that_gets_no_other_qemu_stays_in_its_own(bench: Bench, fault: str) -> None:
    bench.qemu().by_hand("paused")
    bench.runner.faults["web1", "after-save"] = SaveFailed("no room", vm="web1")
    before = bench.qemu()

    async def fail(vm: Vm) -> None:
        bench.runner.faults["web1", fault] = LoadFailed("it does not", vm="web1")
        with pytest.raises(SaveFailed, match="which is postmigrate now"):
            await save(vm)
        bench.runner.faults.clear()
        await vm.resume()

    bench.vm(fail)
    assert bench.qemu() is before
    assert before.status == "running"
    assert bench.runner.beside == {}
    assert bench.runner.violations == []


def test_a_guest_that_a_hand_let_go_on_after_a_save_was_interrupted_is_not_resumed_once_it_has_left(bench: Bench) -> None:
    """Its QEMU stands in postmigrate again, and the guest runs where the admin has migrated it to."""
    bench.qemu().by_hand("paused")
    bench.runner.faults["web1", "half-written"] = SaveFailed("no room", vm="web1")
    bench.dies("before save-undone", save)
    bench.runner.faults.clear()

    async def leave(vm: Vm) -> None:
        assert "left the guest standing" in vm.error
        bench.qemu().by_hand("running")
        await vm.refresh()
        bench.qemu().by_hand("postmigrate")
        with pytest.raises(WrongState, match="there is nothing to resume"):
            await vm.resume()

    bench.vm(leave)
    assert bench.qemu().status == "postmigrate"


def test_an_agent_killed_as_it_undoes_a_save_leaves_no_socket_without_its_name(bench: Bench, tmp_path: Path) -> None:
    address = tmp_path / "qga"
    with socket.socket(socket.AF_UNIX) as agents:
        agents.bind(str(address))
        bench.runner.listening["web1"] = [str(address)]
        bench.qemu().by_hand("paused")
        bench.runner.faults["web1", "after-save"] = SaveFailed("no room", vm="web1")
        bench.dies("adopt", save)
        bench.runner.faults.clear()
        address.rename(f"{address}.of-{os.getpid()}")  # a killed agent gives no name back, as this one's end did
        bench.vm(lambda vm: vm.idle())
        assert address.is_socket()


def test_a_save_whose_qemu_dies_says_so(bench: Bench) -> None:
    async def die(vm: Vm) -> None:
        gate = bench.runner.gates["web1", "save"] = Gate()
        saving = asyncio.ensure_future(save(vm))
        await gate.entered.wait()
        bench.runner.end("web1")
        bench.runner.faults["web1", "save"] = QemuFailed("QEMU went away", vm="web1")
        gate.go.set()
        with pytest.raises(SaveFailed, match="Its QEMU has ended, and the guest is lost unless"):
            await saving
        assert vm.state is VmState.STOPPED

    bench.vm(die)
    assert bench.files() == []


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_connection_that_is_lost_keeps_no_guest_stopped(bench: Bench, status: str) -> None:
    """Its QEMU is still there."""
    bench.qemu().by_hand(status)
    bench.runner.faults["web1", "after-save"] = SaveFailed("no room", vm="web1")
    qemu = bench.qemu()
    run_state = qemu.run_state

    async def lost() -> str:
        qemu.run_state = run_state  # type: ignore[method-assign]
        raise QemuFailed("QEMU closed the connection", vm="web1")

    bench.runner.at["before save-undone"] = lambda: setattr(qemu, "run_state", lost)
    with pytest.raises(SaveFailed, match=f"The guest is {status}, as before"):
        bench.vm(save)
    assert bench.qemu().status == status
    assert bench.runner.violations == []


def test_a_guest_stays_stopped_while_its_half_written_checkpoint_can_not_be_removed(bench: Bench) -> None:
    """It could be loaded later; so nothing may run on that RAM."""

    async def obstruct(vm: Vm) -> None:
        gate = bench.runner.gates["web1", "after-save"] = Gate()
        saving = asyncio.ensure_future(save(vm))
        await gate.entered.wait()
        (bench.root / "checkpoints/web1/manifest.json").mkdir()
        gate.go.set()
        with pytest.raises(SaveFailed, match="could not be removed .* so the guest stays stopped"):
            await saving

    bench.vm(obstruct)
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize("point", ["save", "after-save"])
def test_a_cancelled_save_lets_the_guest_run_on(bench: Bench, point: str) -> None:
    gate = bench.runner.gates["web1", point] = Gate()
    bench.vm(lambda vm: until_cancelled(gate, save(vm)))
    assert bench.qemu().status == "running"
    assert bench.files() == []


@pytest.mark.parametrize("times", [2, 3, 5])
@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_job_that_is_cancelled_again_while_it_takes_back_keeps_its_vm_busy(bench: Bench, status: str, times: int) -> None:
    """Else a start would boot the guest afresh on RAM that the undo is about to give to a second QEMU."""
    undone = "cont" if status == "running" else "start"

    async def act(manager: Manager) -> None:
        vm = manager.vm("web1")
        if status == "paused":
            bench.qemu().by_hand("paused")
        await vm.refresh()
        saved = bench.runner.gates["web1", "after-save"] = Gate()
        undoing = bench.runner.gates["web1", undone] = Gate()
        task = asyncio.ensure_future(save(vm))
        await saved.entered.wait()
        task.cancel()
        await undoing.entered.wait()
        for _ in range(times - 1):
            task.cancel()
            await asyncio.sleep(0)  # so that each cancellation reaches the task
        for other in (vm.start, vm.resume, lambda: save(vm), lambda: vm.load(LoadRequest())):
            with pytest.raises(Busy, match="in the middle of save"):
                await other()
        assert not task.done()
        undoing.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    bench.run(act)
    assert bench.qemu().status == status
    assert bench.files() == []
    assert bench.runner.violations == []


@pytest.mark.parametrize("point", ["connect", "load", "after-load"])
def test_a_cancelled_load_can_be_repeated(bench: Bench, point: str) -> None:
    bench.vm(save)

    async def cancel_and_repeat(vm: Vm) -> None:
        gate = bench.runner.gates["web1", point] = Gate()
        await until_cancelled(gate, vm.load(LoadRequest()))
        assert "web1" not in bench.runner.qemus
        assert vm.state is VmState.SAVED
        del bench.runner.gates["web1", point]
        await vm.load(LoadRequest())

    bench.vm(cancel_and_repeat)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


@pytest.mark.parametrize("point", ["start", "connect", "load", "after-load"])
def test_a_load_that_fails_before_the_guest_ran_can_be_repeated(bench: Bench, point: str) -> None:
    bench.vm(save)

    async def fail_and_repeat(vm: Vm) -> None:
        bench.runner.faults["web1", point] = QemuFailed("something broke", vm="web1")
        with pytest.raises(LoadFailed, match="something broke.*can be repeated"):
            await vm.load(LoadRequest())
        assert "web1" not in bench.runner.qemus
        assert vm.state is VmState.SAVED
        assert bench.files() == SAVED
        bench.runner.faults.clear()
        await vm.load(LoadRequest())

    bench.vm(fail_and_repeat)
    assert bench.qemu().status == "running"


@pytest.mark.parametrize("point", ["cont", "after-cont"])
def test_a_load_that_fails_at_the_end_can_not_be_repeated(bench: Bench, point: str) -> None:
    """Nobody knows whether the guest ran: its checkpoint is spent, and its QEMU is left for the admin."""
    bench.vm(save)

    async def fail(vm: Vm) -> None:
        bench.runner.faults["web1", point] = QemuFailed("something broke", vm="web1")
        with pytest.raises(QemuFailed, match="something broke"):
            await vm.load(LoadRequest())
        assert bench.files() == CONSUMED
        with pytest.raises(AlreadyRunning):
            await vm.load(LoadRequest())

    bench.vm(fail)
    assert bench.qemu().status in ("paused", "running")


def test_a_proof_that_fails_leaves_the_old_qemu_for_a_rollback(bench: Bench) -> None:
    bench.vm(save)
    old = bench.qemu()
    ram = bench.root / "web1.ram"
    content = ram.read_bytes()
    ram.write_bytes(content[:-1] + b"!")
    with pytest.raises(MemoryChanged, match="its RAM is not what it was"):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu() is old
    assert bench.files() == ["held", *SAVED]
    ram.write_bytes(content)
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu() is old
    assert old.status == "running"
    assert bench.files() == ["manifest.json.discarded", "vmstate.discarded"]


def test_a_rollback_retires_the_checkpoint_before_the_guest_runs(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.faults["web1", "cont"] = QemuRefused("the disk is locked", vm="web1")
    with pytest.raises(QemuFailed, match="the disk is locked. The guest stands, whole, in its QEMU"):
        bench.vm(lambda vm: vm.resume())
    assert bench.files() == ["manifest.json.discarded", "vmstate.discarded"]
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (QemuRefused("its storage fails"), "The guest stands, whole, in its QEMU (PID {pid})"),
        (QemuUnreachable("no answer"), "Its QEMU (PID {pid}) is there, with the guest, and does not answer"),
    ],
)
def test_a_qemu_that_says_no_is_not_one_that_has_ended(bench: Bench, error: QemuFailed, told: str) -> None:
    """By the words for an end an admin kills a living guest."""
    bench.runner.faults["web1", "after-save"] = SaveFailed("the disk could not be flushed", vm="web1")
    bench.runner.faults["web1", "cont"] = error
    with pytest.raises(SaveFailed, match=re.escape(told.format(pid=os.getpid()))):
        bench.vm(save)
    assert bench.qemu().status == "postmigrate"


def test_a_guest_that_was_not_let_run_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpr_agent.core.vm.RETRY_S", 0.01)

    async def story(vm: Vm) -> None:
        bench.runner.faults["web1", "after-save"] = SaveFailed("the disk could not be flushed", vm="web1")
        bench.runner.faults["web1", "cont"] = QemuRefused("its storage fails")
        with pytest.raises(SaveFailed):
            await save(vm)
        assert "its storage fails" in vm.error
        trial = bench.runner.gates["web1", "cont"] = Gate()
        await trial.entered.wait()
        bench.runner.faults.clear()
        trial.go.set()
        await vm.idle()
        assert vm.state is VmState.RUNNING
        assert vm.error == ""

    bench.vm(story)


async def hangs_in_its_save(bench: Bench, vm: Vm) -> None:
    """Its storage does, and with it QEMU, which has written its state."""
    bench.runner.faults["web1", "after-save"] = SaveFailed("QEMU did not answer", vm="web1")
    for operation in ("run_state", "connect"):
        bench.runner.faults["web1", operation] = QemuUnreachable("QEMU did not greet", vm="web1")
    with pytest.raises(SaveFailed, match="is there, with the guest, and does not answer"):
        await save(vm)
    assert vm.state is VmState.UNREACHABLE


def test_a_guest_whose_qemu_hung_in_its_save_goes_on_once_that_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpr_agent.core.vm.RETRY_S", 0.01)
    monkeypatch.setattr("cpr_agent.core.vm.MAX_RETRY_S", 0.01)

    async def story(vm: Vm) -> None:
        await hangs_in_its_save(bench, vm)
        for _ in range(2):  # it is asked in vain, and again
            asked = bench.runner.gates["web1", "connect"] = Gate()
            await asked.entered.wait()
            asked.go.set()
        bench.runner.faults.clear()
        goes_on = bench.runner.gates["web1", "cont"] = Gate()
        await goes_on.entered.wait()
        goes_on.go.set()
        await vm.idle()
        assert vm.state is VmState.RUNNING
        assert vm.error == ""

    bench.vm(story)
    assert bench.records()[-3:] == ["save-undone", "save-undone", "resumed"]
    assert bench.runner.violations == []


def test_an_agent_that_finds_a_silent_qemu_asks_it_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpr_agent.core.vm.RETRY_S", 0.01)
    bench.dies("before seal", save)
    bench.runner.faults["web1", "connect"] = QemuUnreachable("QEMU did not greet", vm="web1")

    async def story(vm: Vm) -> None:
        assert vm.state is VmState.UNREACHABLE
        bench.runner.faults.clear()
        goes_on = bench.runner.gates["web1", "cont"] = Gate()
        await goes_on.entered.wait()
        goes_on.go.set()
        await vm.idle()

    bench.vm(story)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


def test_an_act_waits_for_a_look_at_a_silent_qemu_and_is_not_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpr_agent.core.vm.RETRY_S", 0.01)

    async def story(vm: Vm) -> None:
        await hangs_in_its_save(bench, vm)
        looked = bench.runner.gates["web1", "connect"] = Gate()
        await looked.entered.wait()
        assert not vm.busy
        stopping = asyncio.ensure_future(vm.stop("hard"))
        await asyncio.sleep(0)
        looked.go.set()
        await stopping
        assert vm.state is VmState.STOPPED

    bench.vm(story)


def test_nobody_is_told_only_to_end_a_qemu_that_is_silent(bench: Bench) -> None:
    async def story(vm: Vm) -> None:
        await hangs_in_its_save(bench, vm)
        with pytest.raises(QemuUnreachable, match="`cprctl resume web1` looks at it again") as caught:
            await save(vm)
        assert "storage or swtpm may hang" in caught.value.remedy
        bench.runner.faults.clear()
        await vm.resume()
        assert vm.state is VmState.RUNNING

    bench.vm(story)


def test_a_suspended_guest_is_taken_back_by_a_load(bench: Bench) -> None:
    """``cont`` would abort QEMU (measured)."""
    old = bench.qemu()
    old.by_hand("suspended")
    bench.vm(save)
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu() is not old
    assert bench.files() == CONSUMED


def test_blocked_guests_are_not_touched(bench: Bench) -> None:
    bench.runner.blocked["web1"] = ["a device says no", "so does another"]
    with pytest.raises(Blocked) as caught:
        bench.vm(save)
    assert caught.value.reasons == ["a device says no", "so does another"]
    assert bench.records() == ["start"]
    assert bench.qemu().status == "running"


ACTS: list[Callable[[Vm], Awaitable[object]]] = [
    save,
    lambda vm: vm.load(LoadRequest()),
    lambda vm: vm.start(),
    lambda vm: vm.stop("hard"),
    lambda vm: vm.resume(),
    lambda vm: vm.discard(),
]


@pytest.mark.parametrize("act", ACTS)
def test_acts_exclude_each_other(bench: Bench, act: Callable[[Vm], Awaitable[object]]) -> None:
    async def collide(vm: Vm) -> None:
        gate = bench.runner.gates["web1", "save"] = Gate()
        saving = asyncio.ensure_future(save(vm))
        await gate.entered.wait()
        with pytest.raises(Busy, match="in the middle of save"):
            await act(vm)
        gate.go.set()
        await saving

    bench.vm(collide)
    assert bench.files() == SAVED


def test_what_is_saved_is_neither_saved_nor_started_again(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.end("web1")
    for act in (save, lambda vm: vm.start()):
        with pytest.raises(AlreadySaved):
            bench.vm(act)
    with pytest.raises(NoCheckpoint):
        bench.vm(lambda vm: vm.discard(), name="web1") or bench.vm(lambda vm: vm.load(LoadRequest()))


def test_a_start_that_fails_leaves_nothing(bench: Bench) -> None:
    bench.vm(lambda vm: vm.stop("hard"))
    for point in ("start", "connect"):
        bench.runner.faults = {("web1", point): QemuFailed("no such machine", vm="web1")}
        with pytest.raises(QemuFailed, match="no such machine. Nothing runs"):
            bench.vm(lambda vm: vm.start())
        assert bench.runner.qemus == {}
