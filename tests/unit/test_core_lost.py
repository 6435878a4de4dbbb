# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that is lost, and memory that is only doubtful: what starts afresh, and what is held."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.events import Event
from cpr_agent.core.jobs import Job
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import CpuFacts, Difference, Held, QemuFacts, VmState, Vmstate
from cpr_agent.core.proof import refuse_foreign_state
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, DeviceMissing, MachineChanged, MemoryChanged, NotVmstate
from tests.bench import RAM_BYTES, Bench, ended
from tests.fakes import AgentKilled

LOST = ["manifest.json.lost", "vmstate.lost"]


def saved(
    root: Path,
    on_lost_memory: str = "cold-start",
    provider: str = "ACPI.NFIT",
    device: str = "",
    witness: Literal["sampled", "off"] = "sampled",
) -> Bench:
    """A VM that was saved, and its host started anew by a kexec."""
    bench = Bench(root, witness)
    bench.define("web1", device or bench.define_device("web1", provider), on_lost_memory=on_lost_memory)
    bench.vm(lambda vm: vm.start())
    bench.vm(lambda vm: vm.save(SaveRequest()))
    bench.reboot()
    bench.host.by_kexec = True
    return bench


def blank(bench: Bench) -> None:
    (bench.root / "web1.dax").write_bytes(bytes(RAM_BYTES))


def change(bench: Bench) -> None:
    (bench.root / "web1.dax").write_bytes(bytes([7]) * RAM_BYTES)


async def load(vm: Vm) -> str:
    return await vm.load(LoadRequest())


async def held(vm: Vm) -> Held | None:
    return vm.held()


def test_memory_that_is_zero_is_lost_and_the_guest_boots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = saved(tmp_path)
    blank(bench)
    assert "each byte of it" in bench.vm(load)
    assert bench.runner.started[-1] == ("web1", "start")
    assert bench.qemu().status == "running"
    assert bench.files() == LOST
    assert bench.records()[-3:] == ["memory-lost", "start", "cold-started"]
    (told,) = [record for record in caplog.records if getattr(record, "cpr_event", None) is Event.MEMORY_LOST]
    assert told.__dict__["cpr_fields"]["vm"] == "web1"
    assert bench.vm(held) is None


def test_by_default_even_lost_memory_is_held(tmp_path: Path) -> None:
    bench = saved(tmp_path, "hold")
    blank(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(load)
    assert_held(bench)


def assert_held(bench: Bench) -> None:
    assert bench.files()[:2] == ["held", "manifest.json"]
    assert bench.runner.qemus == {}
    assert bench.runner.started.count(("web1", "start")) == 1, "a QEMU may come up to load, while the RAM is being proved"
    assert "resume" not in bench.records()
    assert bench.records().count("held") == 1


def test_a_doubt_is_held_with_what_was_expected_and_found(tmp_path: Path) -> None:
    bench = saved(tmp_path)
    change(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(load)
    assert_held(bench)
    kept = bench.vm(held)
    assert kept
    assert kept.error == "MemoryChanged"
    assert kept.at > 0
    (one,) = kept.evidence
    assert one.what == "witness of its RAM (sampled)"
    assert one.expected != one.found
    assert len(one.expected) == len(one.found) == 32


def test_a_device_that_is_not_there_is_a_doubt(tmp_path: Path) -> None:
    bench = saved(tmp_path)
    devices, bench.devices = bench.devices, type(bench.devices)()
    with pytest.raises(DeviceMissing):
        bench.vm(load)
    assert "manifest.json" in bench.files()
    bench.devices = devices
    assert bench.vm(load) == ""


def test_another_device_is_a_doubt(tmp_path: Path) -> None:
    bench = saved(tmp_path)
    blank(bench)
    device = bench.devices.list()[0]
    bench.devices = type(bench.devices)(replace(device, align_bytes=8192))
    with pytest.raises(MemoryChanged, match="align_bytes was"):
        bench.vm(load)
    assert_held(bench)


@pytest.mark.parametrize("by_kexec", [False, True])
def test_ordinary_ram_is_lost_by_a_power_cut_and_by_nothing_else(tmp_path: Path, *, by_kexec: bool) -> None:
    bench = saved(tmp_path, provider="e820")
    bench.host.by_kexec = by_kexec
    change(bench)
    if by_kexec:
        with pytest.raises(MemoryChanged):
            bench.vm(load)
        assert_held(bench)
    else:
        assert "ordinary RAM of the host" in bench.vm(load)
        assert bench.files() == LOST


def test_ordinary_ram_that_outlived_a_reset_is_loaded(tmp_path: Path) -> None:
    bench = saved(tmp_path, provider="e820")
    bench.host.by_kexec = False
    assert bench.vm(load) == ""
    assert bench.runner.violations == []


def test_ordinary_ram_after_a_power_cut_is_never_taken_on_trust(tmp_path: Path) -> None:
    bench = saved(tmp_path, "hold", provider="e820", witness="off")
    bench.host.by_kexec = False
    with pytest.raises(MemoryChanged, match="the checkpoint has no witness"):
        bench.vm(load)
    assert_held(bench)
    bench.host.by_kexec = True
    assert bench.vm(load) == ""


@pytest.fixture
def shm() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="cpr-agent-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


def test_a_file_in_ram_is_lost_with_the_boot(tmp_path: Path, shm: Path) -> None:
    bench = saved(tmp_path, device=str(shm / "web1"))
    (shm / "web1").unlink()
    assert "was a file in RAM (tmpfs)" in bench.vm(load)
    assert bench.qemu().status == "running"
    assert bench.files() == LOST


def test_a_file_in_ram_that_is_gone_in_the_same_boot_is_a_doubt(tmp_path: Path, shm: Path) -> None:
    """It may be open somewhere, or was renamed."""
    bench = saved(tmp_path, device=str(shm / "web1"))
    bench.host.boot = 1
    (shm / "web1").rename(shm / "aside")
    with pytest.raises(DeviceMissing):
        bench.vm(load)
    (shm / "aside").rename(shm / "web1")
    assert bench.vm(load) == ""


async def load_all(manager: Manager) -> Job:
    return await ended(manager, manager.load_all())


def test_a_load_of_all_tells_who_was_started_afresh(tmp_path: Path) -> None:
    bench = saved(tmp_path)
    blank(bench)
    assert bench.run(load_all).result == "done"
    assert bench.qemu().status == "running"


def test_an_agent_that_is_killed_on_the_way_starts_the_guest_once(tmp_path: Path) -> None:
    for points in range(1, 200):
        root = tmp_path / str(points)
        root.mkdir()
        bench = saved(root)
        blank(bench)
        bench.runner.life_left = points
        with contextlib.suppress(AgentKilled, CprError):
            bench.vm(load)
        lived, bench.runner.life_left = bench.runner.agent_lives, None
        bench.run(load_all)
        where = f"killed at point {points}: {bench.records()[-6:]}"
        assert bench.qemu().status == "running", where
        assert "resume" not in bench.records(), where
        assert bench.files() == LOST, where
        if lived:
            return
    raise AssertionError("it never got done")


def test_a_lesser_machine_holds_the_guest(tmp_path: Path) -> None:
    bench = saved(tmp_path)
    bench.runner.lacking = [Difference("CPU features", "avx2", "they are gone")]
    with pytest.raises(MachineChanged, match="CPU features was avx2, is they are gone"):
        bench.vm(load)
    assert bench.runner.qemus == {}
    assert "manifest.json" in bench.files()
    assert bench.vm(lambda vm: _state(vm)) is VmState.HELD
    bench.runner.lacking = []
    assert bench.vm(load) == ""
    assert bench.runner.violations == []


async def _state(vm: Vm) -> VmState:
    return vm.state


def test_a_state_of_another_machine_is_not_stored() -> None:
    facts = QemuFacts(version="10.0", machine_type="pc-q35-10.0", dialect="cpr-reboot", cpu=CpuFacts(count=2))
    right = Vmstate(path="vmstate", size_bytes=1, sha256="", machine="pc-q35-10.0", cpus=2)
    refuse_foreign_state(right, facts)
    refuse_foreign_state(replace(right, machine="", cpus=0), facts)  # it does not say
    for wrong in (replace(right, machine="pc-q35-9.2"), replace(right, cpus=1)):
        with pytest.raises(NotVmstate, match="is not of this VM"):
            refuse_foreign_state(wrong, facts)


@pytest.mark.parametrize("point", ["before discard-files", "after discard-files"])
def test_a_guest_whose_old_qemu_is_there_still_boots_after_a_kill(tmp_path: Path, point: str) -> None:
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"), autostart=True, on_lost_memory="cold-start")
    bench.vm(lambda vm: vm.start())
    bench.vm(lambda vm: vm.save(SaveRequest()))
    blank(bench)
    bench.dies(point, load)
    bench.run(lambda manager: ended(manager, manager.load_and_start_all()))
    assert bench.runner.started.count(("web1", "start")) == 2
    assert bench.qemu().status == "running"
    assert bench.records()[-1] == "cold-started"
    assert bench.runner.violations == []
