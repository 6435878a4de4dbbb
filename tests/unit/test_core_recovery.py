# SPDX-License-Identifier: GPL-2.0-or-later
"""What the next agent makes of what a dead one left: every run state of QEMU, checkpoint and journal that there can be."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import (
    CheckpointUnreadable,
    CprError,
    LoadFailed,
    MemoryInUse,
    QemuFailed,
    SaveFailed,
    WrongState,
)
from cpr_agent.store.checkpoints import CheckpointStore
from tests.bench import Bench
from tests.processes import holding

SAVED = ["manifest.json", "vmstate"]
LOADED = ["manifest.json.loaded", "vmstate.loaded"]
DISCARDED = ["manifest.json.discarded", "vmstate.discarded"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A VM that runs; the agent that started it is gone."""
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    return bench


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


def recover(bench: Bench) -> VmState:
    async def look(vm: Vm) -> VmState:
        return vm.state

    return bench.vm(look)


@pytest.mark.parametrize("status", ["running", "paused", "suspended", "shutdown"])
def test_a_qemu_without_checkpoint_is_left_as_it_is(bench: Bench, status: str) -> None:
    qemu = bench.qemu()
    qemu.status = status
    recover(bench)
    assert bench.qemu() is qemu
    assert qemu.status == status


def test_a_checkpoint_without_qemu_waits(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.end("web1")
    assert recover(bench) is VmState.SAVED
    assert bench.runner.qemus == {}
    assert bench.files() == SAVED


@pytest.mark.parametrize("act", ["load", "resume", "discard"])
@pytest.mark.parametrize("next_agent", [False, True])
def test_a_saved_qemu_that_does_not_answer_is_not_replaced(bench: Bench, act: str, *, next_agent: bool) -> None:
    """On another socket its guest may have been let run, which ends its checkpoint."""

    async def refused(vm: Vm) -> None:
        bench.runner.faults["web1", "run_state"] = QemuFailed("no answer", vm="web1")
        bench.qemu().by_hand("running")
        with pytest.raises(QemuFailed, match="does not answer"):
            await (vm.load(LoadRequest()) if act == "load" else getattr(vm, act)())

    async def save_and_go_on(vm: Vm) -> None:
        await save(vm)
        if not next_agent:
            await refused(vm)

    qemu = bench.qemu()
    bench.vm(save_and_go_on)
    if next_agent:
        bench.vm(refused)
    assert (bench.qemu(), qemu.status, bench.files()) == (qemu, "running", SAVED)
    bench.runner.faults.clear()
    assert recover(bench) is VmState.RUNNING
    assert bench.files() == DISCARDED


def test_a_saved_qemu_is_kept_for_a_rollback(bench: Bench) -> None:
    bench.vm(save)
    assert recover(bench) is VmState.SAVED
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize("status", ["running", "suspended"])
def test_a_checkpoint_whose_guest_was_resumed_by_hand_is_retired(bench: Bench, status: str) -> None:
    bench.vm(save)
    bench.qemu().by_hand(status)
    assert recover(bench) == status
    assert bench.files() == DISCARDED


@pytest.mark.parametrize("status", ["inmigrate", "paused", "prelaunch"])
def test_a_load_that_was_interrupted_before_its_guest_ran_is_repeated_in_a_new_qemu(bench: Bench, status: str) -> None:
    bench.vm(save)
    bench.dies("after load-begin", lambda vm: vm.load(LoadRequest()))
    manifest = CheckpointStore(bench.root / "checkpoints", ()).live("web1")
    assert manifest
    old = bench.runner.put(bench.qemu().launch, status, kind="load", checkpoint=manifest.id)
    assert recover(bench) is VmState.RUNNING
    assert bench.qemu() is not old
    assert bench.files() == LOADED
    assert bench.runner.violations == []


def test_a_load_that_never_gets_done_is_left_to_the_admin(bench: Bench) -> None:
    """It may be what kills the agent."""
    bench.vm(save)
    bench.dies("after load-begin", lambda vm: vm.load(LoadRequest()))
    for _ in range(2):
        bench.dies("after load-begin", live_checkpoint)
    assert recover(bench) is VmState.SAVED
    assert bench.records().count("load-begin") == 3
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu().status == "running"


def test_a_load_that_failed_is_not_repeated_by_itself(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.faults["web1", "load"] = LoadFailed("no", vm="web1")
    with pytest.raises(LoadFailed):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    bench.runner.faults.clear()
    assert recover(bench) is VmState.SAVED


async def live_checkpoint(vm: Vm) -> object:
    return vm.live_checkpoint()


@pytest.mark.parametrize("status", ["paused", "shutdown", "io-error"])
def test_a_checkpoint_whose_guest_ran_and_stopped_again_is_retired(bench: Bench, status: str) -> None:
    """Its QEMU is not in postmigrate any more, and no load has put it where it is."""
    bench.vm(save)
    qemu = bench.qemu()
    qemu.run()
    qemu.status = status
    recover(bench)
    assert bench.qemu() is qemu
    assert bench.files() == DISCARDED


# -- at each record of the journal ------------------------------------------------------------------------------------


def test_a_guest_that_ran_goes_on_after_an_interrupted_save(bench: Bench) -> None:
    bench.dies("after save-begin", save)
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.RUNNING
    assert bench.files() == [".vmstate.saving"]
    bench.vm(save)
    assert bench.files() == SAVED


@pytest.mark.parametrize("status", ["paused", "suspended"])
@pytest.mark.parametrize("point", ["before seal", "before commit"])
def test_the_state_of_a_guest_that_did_not_run_is_stored_after_an_interrupted_save(
    bench: Bench, status: str, point: str
) -> None:
    """QEMU would not write it again."""
    qemu = bench.qemu()
    qemu.by_hand(status)
    bench.dies(point, save)
    assert qemu.status == "postmigrate"
    assert recover(bench) is VmState.SAVED
    assert bench.qemu() is qemu
    assert getattr(bench.vm(live_checkpoint), "run_state", "") == status
    bench.runner.end("web1")
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.runner.violations == []


@pytest.mark.parametrize("fault", ["save", "after-save"])
def test_a_guest_that_an_admin_migrated_away_after_a_save_that_failed_is_not_resumed(bench: Bench, fault: str) -> None:
    bench.runner.faults["web1", fault] = SaveFailed("no room", vm="web1")
    with pytest.raises(SaveFailed):
        bench.vm(save)
    bench.runner.faults.clear()
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.PAUSED
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_guest_that_an_admin_migrated_away_after_a_save_that_was_interrupted_is_not_resumed(
    bench: Bench, status: str
) -> None:
    bench.qemu().by_hand(status)
    bench.dies("after save-begin", save)
    recover(bench)
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.PAUSED
    assert bench.qemu().status == "postmigrate"


def test_a_guest_that_an_admin_let_run_and_migrated_away_is_not_resumed(bench: Bench) -> None:
    """The rollback did not come to its end."""
    bench.vm(save)

    async def resume_in_vain(vm: Vm) -> None:
        bench.runner.faults["web1", "cont"] = QemuFailed("the disk is locked", vm="web1")
        with pytest.raises(QemuFailed, match="the disk is locked"):
            await vm.resume()
        bench.runner.faults.clear()
        bench.qemu().by_hand("running")
        await vm.refresh()

    bench.vm(resume_in_vain)
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.PAUSED
    assert bench.qemu().status == "postmigrate"


@pytest.mark.parametrize("point", ["before seal", "before resumed"])
def test_a_guest_that_was_not_resumed_because_of_another_process_is_resumed_once_that_has_ended(
    bench: Bench, point: str
) -> None:
    """Of a save that was interrupted, or of a load."""
    if point == "before resumed":
        bench.vm(save)
    bench.dies(point, save if point == "before seal" else lambda vm: vm.load(LoadRequest()))
    bench.qemu().status = "postmigrate" if point == "before seal" else "paused"

    async def resume(vm: Vm) -> None:
        assert vm.state is VmState.PAUSED
        with pytest.raises(MemoryInUse):
            await vm.resume()
        other.stdin.close()  # type: ignore[union-attr]
        other.wait()
        await vm.resume()

    with holding(bench.root / "web1.ram") as other:
        bench.vm(resume)
    assert bench.qemu().status == "running"
    assert bench.records()[-1] == "resumed"
    with pytest.raises(WrongState, match="nothing to resume"):
        bench.vm(lambda vm: vm.resume())
    assert bench.runner.violations == []


def test_a_guest_that_its_old_qemu_did_not_take_back_at_once_is_resumed_in_it(bench: Bench) -> None:
    """After a transfer that failed. Nothing else than the journal knows that the guest has run nowhere else."""
    bench.runner.transfers = True
    old = bench.qemu()

    async def fail(vm: Vm) -> None:
        bench.runner.faults["web1", "half-taken"] = QemuFailed("the new one is broken", vm="web1")
        bench.runner.faults["web1", "cont"] = QemuFailed("the disk is locked", vm="web1")
        with pytest.raises(LoadFailed, match="the disk is locked"):
            await vm.replace_qemu()
        bench.runner.faults.clear()
        await vm.resume()
        assert vm.state is VmState.RUNNING

    bench.vm(fail)
    assert (bench.qemu(), old.status) == (old, "running")
    assert bench.records()[-3:] == ["transfer-undone", "resumed", "refreshed"]


def test_one_vm_that_can_not_be_recorded_keeps_no_agent_from_its_start(bench: Bench) -> None:
    bench.dies("before seal", save)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left")

    bench.runner.at["before save-undone"] = full
    assert recover(bench) is VmState.PAUSED
    bench.runner.at.clear()
    assert recover(bench) is VmState.RUNNING


def test_a_save_that_was_interrupted_before_its_last_record_is_a_save(bench: Bench) -> None:
    bench.dies("before saved", save)
    assert recover(bench) is VmState.SAVED


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_load_that_was_interrupted_after_its_checkpoint_was_spent_is_finished(bench: Bench, status: str) -> None:
    """Only this QEMU has the guest; one that ran before the save must run."""
    bench.qemu().by_hand(status)
    bench.vm(save)
    bench.dies("before resumed", lambda vm: vm.load(LoadRequest()))
    qemu = bench.qemu()
    qemu.status = "paused"
    assert recover(bench) == status
    assert bench.qemu() is qemu
    assert bench.files() == LOADED


def test_a_rollback_that_was_interrupted_is_finished(bench: Bench) -> None:
    bench.vm(save)
    bench.dies("before discard-files", lambda vm: vm.resume())
    assert recover(bench) is VmState.SAVED
    bench.dies("after discard-files", lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"
    assert recover(bench) is VmState.RUNNING


# -- what must not be touched -----------------------------------------------------------------------------------------


def test_a_guest_that_an_admin_migrated_away_is_not_resumed(bench: Bench) -> None:
    """Its QEMU stopped in postmigrate, and elsewhere the guest runs: a resume would be a second one."""
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.PAUSED
    assert bench.qemu().status == "postmigrate"


def test_a_guest_that_an_admin_migrated_away_is_not_resumed_for_an_old_saves_sake(bench: Bench) -> None:
    bench.vm(save)
    bench.vm(lambda vm: vm.load(LoadRequest()))
    bench.qemu().status = "postmigrate"
    assert recover(bench) is VmState.PAUSED
    assert bench.qemu().status == "postmigrate"


def test_a_guest_whose_checkpoint_can_not_be_read_is_not_resumed(bench: Bench) -> None:
    """It would run, and leave a manifest that somebody could mend and load."""
    bench.dies("before saved", save)
    manifest = bench.root / "checkpoints/web1/manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-5])
    recover(bench)
    assert bench.qemu().status == "postmigrate"
    for act in (lambda vm: vm.resume(), lambda vm: vm.load(LoadRequest()), save):
        with pytest.raises(CheckpointUnreadable):
            bench.vm(act)
    manifest.write_bytes(content)
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "running"
    with pytest.raises(CprError):
        bench.vm(lambda vm: vm.load(LoadRequest()))


def test_an_agent_that_dies_as_it_takes_a_transfer_back_leaves_that_to_the_next(bench: Bench) -> None:
    bench.runner.transfers = True
    bench.runner.faults["web1", "half-taken"] = QemuFailed("the new one is broken", vm="web1")
    old = bench.qemu()
    bench.dies("after transfer-undone", lambda vm: vm.replace_qemu())
    bench.runner.faults.clear()
    assert old.status == "postmigrate"
    assert recover(bench) is VmState.RUNNING
    assert (bench.qemu(), old.status) == (old, "running")
    assert bench.runner.violations == []
