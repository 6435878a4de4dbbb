# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs whose QEMU another service of the host runs: what comes earlier, what comes later, and who may begin an act."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Difference, Launch, Part, PluggedDevice, Survives, VmState
from cpr_agent.core.ports import Ports
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from cpr_agent.core.vm import Vm
from cpr_agent.errors import (
    AlreadySaved,
    Blocked,
    Busy,
    CprError,
    LoadFailed,
    MemoryChanged,
    NoCheckpoint,
    NoSuchVM,
    QemuFailed,
    QemuUnreachable,
    SaveFailed,
)
from cpr_agent.vm.definition import DefinitionDirectory
from tests.bench import Bench, ended


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.runner.delegated = True
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    return bench


@pytest.fixture
def saved(bench: Bench) -> Bench:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    return bench


async def state(manager: Manager) -> VmState:
    return manager.vm("web1").state


async def checkpoint(vm: Vm) -> str:
    manifest = vm.live_checkpoint()
    return manifest.id if manifest else ""


def spoil(bench: Bench) -> None:
    with (bench.root / "web1.dax").open("r+b") as ram:
        ram.seek(8192)
        ram.write(b"\xaa" * 4096)


# -- the proof -------------------------------------------------------------------------------------------------------------


def test_no_qemu_is_started_on_memory_that_is_not_proved(saved: Bench) -> None:
    """The state comes with it: there is no moment for a proof in between."""
    saved.runner.end("web1")
    spoil(saved)
    with pytest.raises(MemoryChanged):
        saved.vm(lambda vm: vm.load(LoadRequest()))
    assert ("web1", "load") not in saved.runner.started
    assert saved.run(state) is VmState.HELD


def test_a_qemu_that_its_service_did_not_let_run_leaves_the_checkpoint_live(saved: Bench) -> None:
    saved.runner.faults["web1", "cont"] = LoadFailed("its guest was not let run", vm="web1")
    with pytest.raises(LoadFailed, match=r"was not let run. The checkpoint is kept"):
        saved.vm(lambda vm: vm.load(LoadRequest()))
    assert saved.runner.qemus == {}
    assert "manifest.json" in saved.files()
    saved.runner.faults.clear()
    saved.vm(lambda vm: vm.load(LoadRequest()))
    assert saved.qemu().count == saved.runner.counts["web1"]
    assert saved.runner.violations == []


def test_a_paused_guest_that_its_service_gives_up_at_last_leaves_the_checkpoint_live(bench: Bench) -> None:
    bench.qemu().by_hand("paused")
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.runner.faults["web1", "settle"] = LoadFailed("another hook said no", vm="web1")
    with pytest.raises(LoadFailed):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    assert "manifest.json" in bench.files()
    bench.runner.faults.clear()
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu().status == "paused"
    assert "manifest.json" not in bench.files()


def test_the_service_may_go_on_once_a_paused_guest_is_loaded(bench: Bench) -> None:
    bench.qemu().by_hand("paused")
    bench.vm(lambda vm: vm.save(SaveRequest()))

    async def load(vm: Vm) -> list[str]:
        bench.runner.settled.clear()
        await vm.load(LoadRequest())
        return bench.runner.settled

    assert bench.vm(load) == ["web1"]


# -- the save --------------------------------------------------------------------------------------------------------------


def test_a_guest_that_was_stopped_for_a_save_runs_on_after_a_crash(bench: Bench) -> None:
    """It is paused, and nothing was written yet."""
    bench.dies("stopped first", lambda vm: vm.save(SaveRequest()))
    assert bench.qemu().status == "paused"
    assert bench.run(state) is VmState.RUNNING
    assert bench.records()[-2:] == ["save-undone", "resumed"]


def test_a_guest_that_somebody_paused_stays_paused_after_a_restart_of_the_agent(bench: Bench) -> None:
    bench.qemu().by_hand("paused")
    assert bench.run(state) is VmState.PAUSED


def test_a_paused_guest_whose_save_fails_stays_in_its_qemu(bench: Bench) -> None:
    bench.qemu().by_hand("paused")
    qemu = bench.qemu()
    bench.runner.faults["web1", "after-save"] = QemuFailed("the disk is full", vm="web1")
    with pytest.raises(SaveFailed, match="which is postmigrate now"):
        bench.vm(lambda vm: vm.save(SaveRequest()))
    assert bench.qemu() is qemu
    assert "manifest.json" not in bench.files()


def test_a_refresh_is_in_turn_by_itself(bench: Bench) -> None:
    assert bench.vm(lambda vm: vm.replace_qemu()) is Replacement.IN_TURN
    assert bench.runner.beside == {}
    assert bench.qemu().count == bench.runner.counts["web1"]


def test_a_kexec_is_refused_if_the_installed_qemu_could_not_load_the_guest(bench: Bench) -> None:
    """Its service knows; no QEMU is started to be asked."""
    bench.host.installed = "another"
    bench.runner.lacking = [Difference("machine type", "pc-q35-10.0", "not among its types")]
    with pytest.raises(Blocked, match="lacks what it needs: machine type"):
        bench.vm(lambda vm: vm.require_saveable(Survives.KEXEC))
    assert bench.runner.beside == {}


# -- starts by others ------------------------------------------------------------------------------------------------------


def test_a_start_with_the_live_checkpoint_is_a_load(saved: Bench) -> None:
    saved.runner.end("web1")
    wanted = saved.vm(checkpoint)
    saved.run(lambda manager: manager.arrive("web1", wanted))
    assert saved.run(state) is VmState.RUNNING
    assert saved.runner.started[-1] == ("web1", "load")
    assert saved.qemu().count == saved.runner.counts["web1"]


def test_a_start_without_a_state_boots_a_guest_that_is_not_saved(bench: Bench) -> None:
    bench.runner.end("web1")
    bench.run(lambda manager: manager.arrive("web1", ""))
    assert bench.runner.started.count(("web1", "start")) == 2


@pytest.mark.parametrize(
    ("carried", "error"), [("", AlreadySaved), ("of-another", NoCheckpoint)], ids=["afresh", "another checkpoint"]
)
def test_no_other_start_touches_a_saved_guest(saved: Bench, carried: str, error: type[CprError]) -> None:
    saved.runner.end("web1")
    before = len(saved.runner.started)
    with pytest.raises(error):
        saved.run(lambda manager: manager.arrive("web1", carried))
    assert len(saved.runner.started) == before
    assert "manifest.json" in saved.files()


def test_a_checkpoint_that_is_spent_is_not_loaded_again(saved: Bench) -> None:
    wanted = saved.vm(checkpoint)
    saved.vm(lambda vm: vm.load(LoadRequest()))
    saved.runner.end("web1")
    with pytest.raises(NoCheckpoint, match="spent"):
        saved.run(lambda manager: manager.arrive("web1", wanted))
    assert saved.runner.qemus == {}


def test_a_start_of_a_vm_that_is_not_known_is_refused(bench: Bench) -> None:
    with pytest.raises(NoSuchVM):
        bench.run(lambda manager: manager.arrive("web9", ""))


def test_a_vm_that_was_defined_just_now_may_be_started(bench: Bench) -> None:
    async def arrive(manager: Manager) -> VmState:
        bench.define("web2")
        await manager.arrive("web2", "")
        return manager.vm("web2").state

    assert bench.run(arrive) is VmState.RUNNING


# -- on the way into another kernel ----------------------------------------------------------------------------------------


async def _upgraded(bench: Bench, manager: Manager) -> str:
    job = manager.upgrade(UpgradeRequest())
    await bench.kexec.started.wait()
    arrived = "let in"
    try:
        await manager.arrive("web1", await checkpoint(manager.vm("web1")))
    except Busy:
        arrived = "refused"
    assert bench.runner.qemus == {}, "its QEMU was left to who ends it otherwise"
    assert manager.vm("web1").state is VmState.SAVED
    bench.kexec.fail()
    await ended(manager, job)
    return arrived


def test_a_saved_guest_has_no_qemu_once_the_kexec_is_committed(bench: Bench) -> None:
    """And goes on by a load if the kexec does not come; nobody may start it in between."""
    assert bench.run(lambda manager: _upgraded(bench, manager)) == "refused"
    assert bench.run(state) is VmState.RUNNING
    assert bench.runner.started.count(("web1", "start")) == 1
    assert bench.qemu().count == bench.runner.counts["web1"]
    assert bench.runner.violations == []


def test_a_saved_guest_that_was_let_run_by_hand_is_not_ended(bench: Bench) -> None:
    async def end(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.save(SaveRequest(need=Survives.KEXEC))
        bench.qemu().status = "running"
        await asyncio.sleep(0)
        await vm.end_saved()

    bench.run(end)
    assert bench.qemu().status == "running"


# -- what is plugged -------------------------------------------------------------------------------------------------------


class _Following(DefinitionDirectory):
    def follows(self, launch: Launch) -> bool:  # noqa: ARG002 - whichever VM's
        return True


class _FollowingBench(Bench):
    """Who makes its command lines keeps account of what is plugged."""

    def ports(self) -> Ports:
        ports = super().ports()
        return replace(ports, definitions=_Following(self.definitions, self.root / "run", self.root / "log"))


def test_a_device_that_goes_along_by_itself_is_no_reason_against_a_save(tmp_path: Path) -> None:
    bench = _FollowingBench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    bench.runner.plugged["web1"] = [PluggedDevice(name="peripheral/net1", kind="e1000")]
    bench.runner.parts["web1"] = [Part(name="network hostnet1", kind="user"), Part(name="dirty bitmap b of d0", kind="x")]
    assert bench.vm(lambda vm: vm.blocked_reasons()) == []
    found = bench.run(lambda manager: manager.vm_findings("web1"))
    assert [one.what for one in found if one.code == "not-carried"] == ["dirty bitmap b of d0 was not there, is x"]


# -- looked at again -------------------------------------------------------------------------------------------------------


def test_a_vm_that_could_not_be_asked_is_recovered_once_it_can_be(bench: Bench) -> None:
    bench.dies("stopped first", lambda vm: vm.save(SaveRequest()))
    bench.runner.faults["web1", "connect"] = QemuUnreachable("the service is away", vm="web1")

    async def back(manager: Manager) -> list[VmState]:
        before = manager.vm("web1").state
        bench.runner.faults.clear()
        await manager.look_again("web1")
        await manager.look_again("no such VM")
        return [before, manager.vm("web1").state]

    assert bench.run(back) == [VmState.UNREACHABLE, VmState.RUNNING]
    assert bench.records()[-2:] == ["save-undone", "resumed"]


def test_a_vm_that_can_be_asked_as_its_recovery_ends_in_vain_is_asked(bench: Bench) -> None:
    bench.dies("stopped first", lambda vm: vm.save(SaveRequest()))
    bench.runner.faults["web1", "connect"] = QemuUnreachable("the service is away", vm="web1")

    async def back(manager: Manager) -> VmState:
        await manager.expect_recovery()
        looking = asyncio.create_task(manager.look_again("web1"))
        await asyncio.sleep(0)
        await manager.recover()
        bench.runner.faults.clear()
        await looking
        return manager.vm("web1").state

    assert bench.run(back) is VmState.RUNNING
