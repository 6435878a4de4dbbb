# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains become VMs, and domains again: on memory that is nobody else's, at rest, and exactly as it was shown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import SaveRequest
from cpr_agent.core.adoption import Outcome, Wanted
from cpr_agent.core.domains import Change
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, Definition, Owner
from cpr_agent.core.ports import Ports
from cpr_agent.domains import xml
from cpr_agent.domains.adoption import LibvirtDomains
from cpr_agent.domains.definitions import DomainDefinitions
from cpr_agent.domains.host import LibvirtPaths
from cpr_agent.domains.names import Places
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Busy,
    CprError,
    InvalidArgument,
    InvalidDefinition,
    MemoryOverlap,
    MemoryUnusable,
    NoSuchVM,
    NotAdoptable,
    NothingToDo,
    QemuRefused,
    QemuUnreachable,
    WrongState,
)
from cpr_agent.vm.definition import DefinitionDirectory
from tests.bench import Bench
from tests.fake_libvirt import Domain, FakeLibvirt, Snapshot
from tests.fakes import FakeDevices

MIB = 1 << 20
XML = Path(__file__).with_name("libvirt").joinpath("domain.xml").read_text()
SIZE = 64 * MIB


class WithDomains(DefinitionDirectory):
    """Definitions of both kinds."""

    def __init__(self, bench: AdoptionBench) -> None:
        super().__init__(bench.definitions, bench.root / "run", bench.root / "log")
        self._domains = DomainDefinitions(LibvirtPaths(bench.root), bench.places)
        self._names: set[str] = set()

    def load_all(self) -> tuple[dict[str, Definition], dict[str, Exception]]:
        good, bad = super().load_all()
        domains, unusable = self._domains.load_all()
        self._names = {*domains, *unusable}
        return {**domains, **good}, {**unusable, **bad}

    def owner(self, name: str) -> Owner:
        return "libvirt" if name in self._names else "agent"


class AdoptionBench(Bench):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.places = Places(root / "run")
        self.libvirt = FakeLibvirt(root)
        node = root / "dax"
        node.touch()
        self.devices = FakeDevices(
            DaxDevice(node=str(node), uuid="one", size_bytes=256 * MIB, align_bytes=2 * MIB, resource=None, numa_node=0)
        )

    def ports(self) -> Ports:
        domains = LibvirtDomains(self.libvirt, self.places, self.libvirt.conf)
        return replace(super().ports(), definitions=WithDomains(self), domains=domains)

    def domain(self, name: str = "web1", mib: int = 64, **state: Any) -> Domain:
        text = XML.replace("<name>web1<", f"<name>{name}<").replace(">65536<", f">{mib << 10}<")
        return self.libvirt.add(text, **state)

    def adopt(self, name: str = "web1", **wanted: Any) -> Outcome:
        return self.run(lambda manager: manager.adoption.adopt(name, Wanted(**wanted)))

    def release(self, name: str = "web1", **wanted: Any) -> Outcome:
        return self.run(lambda manager: manager.adoption.release(name, Wanted(**wanted)))

    def fails(self, kind: type[CprError], work: Callable[[Manager], Awaitable[object]]) -> CprError:
        """The error of ``work``, by which no domain has changed."""
        before = {name: domain.xml for name, domain in self.libvirt.domains.items()}
        with pytest.raises(kind) as caught:
            self.run(work)
        assert {name: domain.xml for name, domain in self.libvirt.domains.items()} == before
        return caught.value

    def adopt_fails(self, kind: type[CprError], name: str = "web1", **wanted: Any) -> CprError:
        return self.fails(kind, lambda manager: manager.adoption.adopt(name, Wanted(**wanted)))


@pytest.fixture
def bench(tmp_path: Path) -> AdoptionBench:
    return AdoptionBench(tmp_path)


def test_an_adopted_domain_is_a_vm_at_once_and_libvirt_s(bench: AdoptionBench) -> None:
    async def work(manager: Manager) -> tuple[str, str, int]:
        await manager.adoption.adopt("web1", Wanted())
        vm = manager.vm("web1")
        (memory,) = await vm.machine.claimed_memory()
        return vm.owner, str(vm.state), memory.size_bytes

    bench.domain()
    assert bench.run(work) == ("libvirt", "stopped", SIZE)


def test_a_released_domain_is_as_it_was_and_no_vm(bench: AdoptionBench) -> None:
    async def work(manager: Manager) -> bool:
        await manager.adoption.adopt("web1", Wanted())
        await manager.adoption.release("web1", Wanted())
        return "web1" in manager.vms

    domain = bench.domain()
    before = domain.xml
    assert not bench.run(work)
    assert domain.xml == before


def test_passwords_are_not_lost_by_a_definition(bench: AdoptionBench) -> None:
    domain = bench.domain()
    domain.xml = domain.xml.replace("<graphics type='vnc'", "<graphics type='vnc' passwd='secret'")
    assert "passwd='secret'" in domain.xml
    change = bench.adopt().change
    assert "passwd='secret'" in domain.xml
    assert "secret" not in change.diff


def test_each_domain_gets_a_range_of_its_own_also_beside_those_that_are_shut_off(bench: AdoptionBench) -> None:
    for number in range(4):
        bench.domain(f"vm{number}")
    offsets = [int(outcome.memory.offset) for outcome in (bench.adopt(f"vm{n}") for n in range(4)) if outcome.memory]
    assert offsets == [0, SIZE, 2 * SIZE, 3 * SIZE]
    bench.domain("late")
    assert "268435456" not in bench.adopt_fails(MemoryUnusable, "late").text
    bench.release("vm1")
    late = bench.adopt("late").memory
    assert late
    assert late.offset == SIZE


def test_the_range_of_an_own_vm_is_not_given_away(bench: AdoptionBench) -> None:
    bench.define("own")
    path = bench.definitions / "own.toml"
    own = '[memory]\nsize = "6M"\ndevice = "uuid:one"\n'
    path.write_text(f"{path.read_text().partition('[memory]')[0]}{own}")
    bench.domain()
    memory = bench.adopt().memory
    assert memory
    assert memory.offset == 6 * MIB
    error = bench.adopt_fails(MemoryOverlap, device="uuid:one", offset="0")
    assert "VM own" in error.text
    assert "web1" in error.text


def test_two_that_are_adopted_at_once_get_two_ranges(bench: AdoptionBench) -> None:
    async def both(manager: Manager) -> list[Outcome]:
        return await asyncio.gather(*(manager.adoption.adopt(name, Wanted()) for name in ("vm1", "vm2")))

    for name in ("vm1", "vm2"):
        bench.domain(name)
    assert {int(one.memory.offset) for one in bench.run(both) if one.memory} == {0, SIZE}


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"device": "uuid:other"}, "no dax device other"),
        ({"device": "uuid:other", "offset": "0"}, "no dax device other"),
        ({"offset": "2M"}, "needs a device"),
        ({"device": "uuid:one", "offset": "much"}, "not a size"),
        ({"device": "/dev/shm/a\nb"}, "does not show"),
    ],
)
def test_memory_that_is_none_is_refused(bench: AdoptionBench, wanted: dict[str, str], why: str) -> None:
    bench.domain()
    error = bench.adopt_fails(InvalidArgument, **wanted)
    assert why in error.text
    assert error.vm == "web1"


@pytest.mark.parametrize("offset", ["4K", "255M", "1T"])
def test_a_range_that_the_device_has_not_is_refused(bench: AdoptionBench, offset: str) -> None:
    bench.domain()
    error = bench.adopt_fails(MemoryUnusable, device="uuid:one", offset=offset)
    assert "nothing was changed" in error.text.lower()


def test_a_size_that_the_device_can_t_have_is_refused(bench: AdoptionBench) -> None:
    bench.domain(mib=65)
    assert "alignment" in bench.adopt_fails(MemoryUnusable).text


def test_a_device_is_named_by_its_uuid_whatever_the_caller_called_it(bench: AdoptionBench) -> None:
    bench.domain()
    memory = bench.adopt(device="one", offset="64M").memory
    assert memory
    assert (memory.device, int(memory.offset)) == ("uuid:one", 64 * MIB)


def test_a_file_that_is_not_there_yet_may_be_the_memory_of_one_alone(bench: AdoptionBench) -> None:
    for name in ("vm1", "vm2"):
        bench.domain(name)
    path = str(bench.root / "ram")
    bench.adopt("vm1", device=path)
    assert "VM vm1" in bench.adopt_fails(MemoryOverlap, "vm2", device=path).text
    bench.adopt("vm2", device=path, offset="64M")


def test_an_old_qemu_gets_memory_at_the_start_of_a_device_alone(bench: AdoptionBench) -> None:
    bench.libvirt.version = 7_002_022
    bench.domain("vm1")
    bench.domain("vm2")
    error = bench.adopt_fails(MemoryUnusable, "vm1", device="uuid:one", offset="64M")
    assert "7.2.22" in error.text
    first = bench.adopt("vm1").memory
    assert first
    assert first.offset == 0
    assert "7.2.22" in bench.adopt_fails(MemoryUnusable, "vm2").text


def test_an_emulator_that_libvirt_tells_no_version_of_is_taken_for_new(bench: AdoptionBench) -> None:
    bench.libvirt.version = 7_002_022
    domain = bench.domain()
    domain.xml = domain.xml.replace("/usr/bin/qemu-system-x86_64", "/opt/bin/qemu-system-x86_64")
    bench.adopt(device="uuid:one", offset="64M")


# -- what stands in the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"active": True}, "is running"),
        ({"persistent": False}, "is transient"),
        ({"saved": True}, "managed save"),
        ({"snapshots": [Snapshot("before", "external")]}, "snapshots with memory (before)"),
        ({"snapshots": [Snapshot("before", "internal")]}, "snapshots with memory (before)"),
    ],
)
def test_a_state_of_the_domain_that_stands_in_the_way_is_named_with_its_remedy(
    bench: AdoptionBench, state: dict[str, Any], why: str
) -> None:
    bench.domain(**state)
    error = bench.adopt_fails(NotAdoptable)
    assert why in error.text
    assert "web1" in error.text
    assert "virsh" in error.remedy


def test_a_snapshot_of_the_disks_alone_does_not(bench: AdoptionBench) -> None:
    bench.domain(snapshots=[Snapshot("disks", "no")])
    bench.adopt()


def test_all_reasons_are_named_at_once(bench: AdoptionBench) -> None:
    bench.libvirt.conf.write_text('save_image_format = "sparse"\nsnapshot_image_format = "lzop"\n')
    domain = bench.domain(active=True)
    domain.xml = domain.xml.replace("  <vcpu", "  <memoryBacking><hugepages/></memoryBacking>\n  <vcpu").replace(
        ">65536<", ">65537<"
    )
    error = bench.adopt_fails(NotAdoptable)
    assert isinstance(error, NotAdoptable)
    assert len(error.causes) == 5
    for word in ("running", "huge pages", "sparse", "lzop", "rounds up"):
        assert word in error.text


def test_settings_that_can_t_be_read_are_a_reason(bench: AdoptionBench) -> None:
    bench.libvirt.conf.write_text("save_image_format = [\n")
    bench.domain()
    assert "qemu.conf can't be read" in bench.adopt_fails(NotAdoptable).text


def test_a_name_that_an_own_vm_has_is_refused(bench: AdoptionBench) -> None:
    bench.define("web1")
    bench.domain()
    assert "virsh domrename" in bench.adopt_fails(InvalidArgument).text
    assert "VM of the agent" in bench.fails(InvalidArgument, lambda m: m.adoption.release("web1", Wanted())).text


def test_a_domain_that_is_not_there(bench: AdoptionBench) -> None:
    assert bench.adopt_fails(NoSuchVM).remedy == "see `virsh list --all`"


def test_a_libvirt_that_is_away(bench: AdoptionBench) -> None:
    bench.domain()
    bench.libvirt.is_away = True
    bench.adopt_fails(QemuUnreachable)


def test_an_adopted_one_that_runs_or_is_saved_is_left_alone(bench: AdoptionBench) -> None:
    """Whatever libvirt says: what the agent knows of its QEMU and its checkpoint counts as well."""

    async def start_and_save(manager: Manager) -> None:
        await manager.vm("web1").start()
        with pytest.raises(AlreadyRunning):
            await manager.adoption.release("web1", Wanted())
        with pytest.raises(AlreadyRunning):
            await manager.adoption.adopt("web1", Wanted(device="uuid:one", offset="64M"))
        await manager.vm("web1").save(SaveRequest())
        with pytest.raises(AlreadySaved):
            await manager.adoption.release("web1", Wanted())

    bench.domain()
    bench.adopt(device=str(bench.root / "ram"))
    before = bench.libvirt.domains["web1"].xml
    bench.run(start_and_save)
    assert bench.libvirt.domains["web1"].xml == before


def test_no_act_begins_while_its_definition_changes(bench: AdoptionBench) -> None:
    async def work(manager: Manager) -> None:
        vm = manager.vm("web1")
        async with vm.at_rest():
            with pytest.raises(Busy, match="change of its definition"):
                await vm.start()
        await vm.refresh()

    bench.domain()
    bench.adopt()
    bench.run(work)


# -- exactly as it was shown --------------------------------------------------------------------------------------------


def test_a_dry_run_changes_nothing_and_its_token_makes_that_change(bench: AdoptionBench) -> None:
    domain = bench.domain()
    before = domain.xml
    shown = bench.adopt(act=False).change
    assert domain.xml == before
    assert bench.adopt(token=shown.token).change == shown


def test_another_change_than_the_one_that_was_shown_is_not_made(bench: AdoptionBench) -> None:
    domain = bench.domain()
    token = bench.adopt(act=False).change.token
    domain.xml = domain.xml.replace("<on_crash>destroy", "<on_crash>restart")
    assert "look at the change again" in bench.adopt_fails(WrongState, token=token).text.lower()


def test_a_domain_that_changes_at_the_last_moment_is_not_overwritten(bench: AdoptionBench) -> None:
    domain = bench.domain()
    change = Change(name="web1", before="<domain/>", after=domain.xml, diff="")
    bench.fails(WrongState, lambda manager: manager.ports.domains.define(change))


def test_what_libvirt_does_not_take_is_undone(bench: AdoptionBench) -> None:
    """Such as a libvirt that drops metadata, or arguments for QEMU."""
    domain = bench.domain()
    before = domain.xml
    bench.libvirt.normalise = lambda text: text.replace("<qemu:arg value='-mon'/>", "")
    with pytest.raises(QemuRefused, match="as it was"):
        bench.adopt()
    assert domain.xml == before


def test_a_domain_that_is_started_while_it_is_defined_is_as_it_was(bench: AdoptionBench) -> None:
    domain = bench.domain()
    before = domain.xml

    def start(text: str) -> str:
        domain.active = True
        return text

    bench.libvirt.normalise = start
    with pytest.raises(QemuRefused, match="started meanwhile"):
        bench.adopt()
    assert domain.xml == before


def test_libvirt_s_refusal_is_told(bench: AdoptionBench) -> None:
    bench.domain()
    bench.libvirt.refusal = "libvirt has not defined the domain: no room"
    assert "no room" in bench.adopt_fails(QemuRefused).text


def test_what_is_so_already_is_nothing_to_do(bench: AdoptionBench) -> None:
    bench.domain()
    bench.fails(NothingToDo, lambda manager: manager.adoption.release("web1", Wanted()))
    bench.adopt()
    defined = len(bench.libvirt.defined)
    bench.adopt_fails(NothingToDo)
    assert len(bench.libvirt.defined) == defined


def test_a_second_adoption_moves_the_memory_and_keeps_the_settings(bench: AdoptionBench) -> None:
    domain = bench.domain()
    bench.adopt()
    domain.xml = domain.xml.replace("</cpr:vm>", "<cpr:save order='7'/></cpr:vm>")
    bench.adopt(device="uuid:one", offset="128M")
    adopted = xml.read(domain.xml, bench.places).adopted
    assert adopted
    assert (int(adopted.offset), adopted.save.order) == (128 * MIB, 7)


def test_a_domain_that_has_grown_is_fitted_by_a_second_adoption(bench: AdoptionBench) -> None:
    domain = bench.domain()
    bench.adopt()
    domain.xml = domain.xml.replace(">65536<", ">131072<")
    bench.libvirt.add(domain.xml)
    memory = bench.adopt().memory
    assert memory
    assert (memory.device, int(memory.size)) == ("uuid:one", 128 * MIB)


def test_a_domain_that_was_renamed_is_mended_with_its_memory_and_settings(bench: AdoptionBench) -> None:
    bench.domain()
    bench.adopt(device="uuid:one", offset="128M")
    text = bench.libvirt.domains.pop("web1").xml.replace("</cpr:vm>", "<cpr:save order='7'/></cpr:vm>")
    (bench.libvirt.directory / "web1.xml").unlink()
    renamed = bench.libvirt.add(text.replace("<name>web1<", "<name>web2<"))
    assert "by hand" in bench.run(_problem_of("web2"))
    memory = bench.adopt("web2").memory
    assert memory
    assert memory.offset == 128 * MIB
    adopted = xml.read(renamed.xml, bench.places).adopted
    assert adopted
    assert adopted.save.order == 7


def _problem_of(name: str) -> Callable[[Manager], Awaitable[str]]:
    async def problem(manager: Manager) -> str:
        return str(manager.vm(name).problem)

    return problem


def test_a_domain_in_a_file_grows_where_it_is(bench: AdoptionBench) -> None:
    domain = bench.domain()
    path = str(bench.root / "ram")
    bench.adopt(device=path, offset="64M")
    bench.libvirt.add(domain.xml.replace(">65536<", ">131072<"))
    memory = bench.adopt().memory
    assert memory
    assert (memory.device, int(memory.offset), int(memory.size)) == (path, 64 * MIB, 128 * MIB)


def test_xml_that_is_none_is_refused_by_the_domain_s_name(bench: AdoptionBench) -> None:
    domain = bench.domain()
    domain.xml = domain.xml.replace("<domain ", "<!DOCTYPE domain>\n<domain ", 1)
    assert bench.adopt_fails(InvalidDefinition).vm == "web1"
