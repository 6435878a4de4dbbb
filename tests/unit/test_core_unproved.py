# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that stand still where nobody expects them: none runs without a proof, and no checkpoint is loaded twice."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CheckpointUnreadable, MemoryChanged, ProofFailed, QemuFailed, WrongState
from tests.bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    return bench


def spoil(bench: Bench) -> None:
    with (bench.root / "web1.dax").open("r+b") as ram:
        ram.seek(8192)
        ram.write(b"\xaa" * 4096)


async def state(manager: Manager) -> VmState:
    return manager.vm("web1").state


def back_up(bench: Bench) -> Path:
    return Path(shutil.copytree(bench.root / "checkpoints/web1", bench.root / "backup"))


def bring_back(bench: Bench) -> None:
    shutil.copytree(bench.root / "backup", bench.root / "checkpoints/web1", dirs_exist_ok=True)


# -- a guest that was loaded, and given up ------------------------------------------------------------------------------


def test_a_guest_that_is_given_up_before_it_ran_can_not_be_resumed(bench: Bench) -> None:
    """Its load was interrupted, and its QEMU was silent when the next agent came."""
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.dies("before resume", lambda vm: vm.load(LoadRequest()))
    bench.runner.faults["web1", "connect"] = QemuFailed("no answer", vm="web1")

    async def give_up(vm: Vm) -> None:
        bench.runner.faults.clear()
        await vm.refresh()
        assert vm.state is VmState.PAUSED
        await vm.discard()
        spoil(bench)
        with pytest.raises(WrongState):
            await vm.resume()

    bench.vm(give_up)
    assert bench.runner.qemus == {}


def test_a_guest_that_ran_keeps_its_qemu_when_a_checkpoint_out_of_a_backup_is_given_up(bench: Bench) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    back_up(bench)
    bench.vm(lambda vm: vm.load(LoadRequest()))
    bench.qemu().by_hand("paused")
    bring_back(bench)
    assert bench.run(state) is VmState.PAUSED, "a new agent takes the backup for a load that was interrupted"
    bench.vm(lambda vm: vm.discard())
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


# -- a paused guest, whose load ends without ``cont`` ---------------------------------------------------------------------


@pytest.mark.parametrize("point", ["after consume", "before resumed"])
def test_the_checkpoint_of_a_paused_guest_is_spent_also_if_its_agent_ends_first(bench: Bench, point: str) -> None:
    bench.qemu().by_hand("paused")
    bench.vm(lambda vm: vm.save(SaveRequest()))
    back_up(bench)
    bench.dies(point, lambda vm: vm.load(LoadRequest()))
    bench.vm(lambda vm: vm.resume())
    bench.vm(lambda vm: vm.stop("hard"))
    bring_back(bench)
    with pytest.raises(ProofFailed, match="the guest has run since this checkpoint was made"):
        bench.vm(lambda vm: vm.load(LoadRequest()))


# -- a resume in the old QEMU, interrupted after its proof ------------------------------------------------------------


@pytest.mark.parametrize("point", ["after rollback", "before discard-files", "after discard-files"])
def test_memory_that_changes_while_no_agent_is_there_holds_an_interrupted_resume(bench: Bench, point: str) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.dies(point, lambda vm: vm.resume())
    spoil(bench)
    bench.run(state)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"
    assert bench.run(state) is VmState.HELD


def test_an_interrupted_resume_is_ended_by_the_next_agent(bench: Bench) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.dies("after discard-files", lambda vm: vm.resume())
    assert bench.run(state) is VmState.RUNNING
    assert "manifest.json" not in bench.files()
    assert bench.records()[-3:] == ["rollback", "rollback", "resumed"]


@pytest.mark.parametrize("point", ["before restore", "after restore", "before rollback", "after rollback"])
def test_an_agent_that_ends_as_it_ends_an_interrupted_resume_loses_nothing(bench: Bench, point: str) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.dies("after discard-files", lambda vm: vm.resume())
    bench.dies(point, lambda vm: vm.refresh())
    if bench.run(state) is VmState.SAVED:
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "running"
    assert "manifest.json" not in bench.files()
    assert bench.runner.violations == []


def test_without_its_checkpoint_an_interrupted_resume_waits_for_an_admin(bench: Bench) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.dies("after discard-files", lambda vm: vm.resume())
    (bench.root / "checkpoints/web1/manifest.json.discarded").unlink()
    with pytest.raises(CheckpointUnreadable, match="`cont` on the admin's QMP socket"):
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"


def test_a_resume_that_can_not_retire_its_checkpoint_is_repeated(bench: Bench) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def resume(vm: Vm) -> None:
        await vm.save(SaveRequest())
        bench.runner.at["after discard-files"] = full
        with pytest.raises(OSError, match="No space left"):
            await vm.resume()
        bench.runner.at.clear()
        await vm.resume()

    bench.vm(resume)
    assert bench.qemu().status == "running"
