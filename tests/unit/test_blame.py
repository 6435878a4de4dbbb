# SPDX-License-Identifier: GPL-2.0-or-later
"""Who cost the pause: the critical paths of a shutdown and of a boot, the kernel's part, and what is told of them."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cpr_agent.core.jobs import Job
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import BootTimes, Unit, UnitStop
from cpr_agent.core.timeline import COSTS, INITRD, KERNEL, PID_1, PURGATORY, Cost, Part
from cpr_agent.core.upgrade.blame import LOADS, boot_path, costs, findings, kernel_costs, shutdown_path
from cpr_agent.core.upgrade.dependents import Dependents
from cpr_agent.core.upgrade.ledger import Replay
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from tests.bench import Bench, ended
from tests.stories import T0, upgrade

KERNEL_AT = 1000.0
USERSPACE_AT = 1002.0


def unit(name: str, began_s: float = 0.0, ended_s: float = 0.0, *after: str, **facts: Any) -> Unit:
    return Unit(name=name, began_s=began_s, ended_s=ended_s, after=frozenset(after), **facts)


def known(*units: Unit, **more: Any) -> Dependents:
    return Dependents({one.name: one for one in units}, ("cpr-agent.service", LOADS), **more)


def path(some: list[Cost]) -> list[tuple[str, float, float]]:
    return [(cost.what, round(cost.begin, 3), round(cost.end, 3)) for cost in some]


BOOT = (
    unit("udevd.service", 2.2, 2.5),
    unit("srv-backup.mount", 2.6, 10.6, "udevd.service", mount_point="/srv/backup"),
    unit("fast.mount", 2.6, 2.7, "udevd.service"),
    unit("local-fs.target", 10.6, 10.6, "srv-backup.mount", "fast.mount"),
    unit("slow-beside.service", 2.2, 40.0),
    unit("dbus.service", 10.7, 11.0, "local-fs.target"),
    unit("cpr-agent.service", 11.0, 12.5, "dbus.service", "local-fs.target"),
    unit(LOADS, 12.5, 0.0, "cpr-agent.service"),
)


def test_the_path_of_a_boot_is_what_the_load_waited_for() -> None:
    found = boot_path(known(*BOOT), KERNEL_AT, USERSPACE_AT, 1012.6)
    assert path([cost for cost in found if cost.length_s]) == [
        (PID_1, 1002.0, 1002.2),
        ("udevd.service", 1002.2, 1002.5),
        ("srv-backup.mount", 1002.6, 1010.6),
        ("dbus.service", 1010.7, 1011.0),
        ("cpr-agent.service", 1011.0, 1012.5),
    ]
    assert [cost.waiter for cost in found if cost.what == "srv-backup.mount"] == ["local-fs.target"]
    assert all(one.end <= other.begin for one, other in pairwise(found))


EARLY_BOOT = (
    unit("systemd-remount-fs.service", 2.3, 2.4),
    unit("cpr-early.service", 2.4, 2.7, "systemd-remount-fs.service"),
    unit("srv-backup.mount", 2.6, 32.6),
    unit("dbus.service", 32.7, 33.0, "srv-backup.mount"),
    unit("cpr-agent.service", 2.7, 4.0, "dbus.service"),
    unit(LOADS, 33.0, 33.5, "cpr-agent.service"),
)


def test_guests_that_went_on_early_have_waited_for_what_starts_the_agent_early() -> None:
    """And not for the bus that its unit is ordered after, or for what that waits for."""
    found = boot_path(known(*EARLY_BOOT), KERNEL_AT, USERSPACE_AT, 1004.1)
    assert path(found) == [
        (PID_1, 1002.0, 1002.3),
        ("systemd-remount-fs.service", 1002.3, 1002.4),
        ("cpr-early.service", 1002.4, 1002.7),
        ("cpr-agent.service", 1002.7, 1004.0),
    ]


def test_a_load_of_all_that_came_at_the_same_time_changes_nothing() -> None:
    units = {one.name: one for one in EARLY_BOOT}
    units[LOADS] = replace(units[LOADS], began_s=4.05)
    units["dbus.service"] = replace(units["dbus.service"], began_s=3.0, ended_s=3.5)
    found = boot_path(known(*units.values()), KERNEL_AT, USERSPACE_AT, 1004.1)
    assert [cost.what for cost in found][-2:] == ["cpr-early.service", "cpr-agent.service"]


def test_an_agent_that_was_restarted_since_is_left_out() -> None:
    units = {one.name: one for one in EARLY_BOOT}
    units["cpr-agent.service"] = replace(units["cpr-agent.service"], began_s=40.0, ended_s=41.0)
    found = boot_path(known(*units.values()), KERNEL_AT, USERSPACE_AT, 1004.1)
    assert [cost.what for cost in found] == [PID_1, "systemd-remount-fs.service", "cpr-early.service"]


def test_a_boot_in_which_nobody_was_early_is_walked_as_ever() -> None:
    units = (*BOOT, unit("cpr-early.service"))
    assert boot_path(known(*units), KERNEL_AT, USERSPACE_AT, 1012.6)[-1].what == "cpr-agent.service"


def test_a_device_is_waited_for_until_it_is_there() -> None:
    """Its unit begins then, and says nothing of the time before."""
    units = (
        unit("sdb.device", 9.0, 9.0, takes_along=frozenset({"vms.mount"})),
        unit("vms.mount", 9.0, 9.3, "sdb.device", mount_point="/vms"),
        unit("local-fs.target", 9.3, 9.3, "vms.mount"),
        unit(LOADS, 9.3, 0.0, "local-fs.target"),
    )
    found = boot_path(known(*units, disks={"/vms/web1.qcow2": "web1"}), KERNEL_AT, USERSPACE_AT, 1009.4)
    assert path(found)[:2] == [("sdb.device", 1002.0, 1009.0), ("vms.mount", 1009.0, 1009.3)]
    assert {cost.needed_by for cost in found[:2]} == {"VM web1 (/vms/web1.qcow2)"}


def test_a_vm_whose_own_unit_waited_longer_is_where_the_path_ends() -> None:
    units = (*BOOT, unit("vms.mount", 2.6, 20.0), unit("cpr-vm@web1.service", 20.0, 20.4, "vms.mount"))
    found = boot_path(known(*units, vms={"cpr-vm@web1.service": "web1"}), KERNEL_AT, USERSPACE_AT, 1021.0)
    assert path(found) == [(PID_1, 1002.0, 1002.6), ("vms.mount", 1002.6, 1020.0)]


def test_a_vm_that_waited_for_nothing_else_is_loaded_when_the_agent_was_ready() -> None:
    units = (*BOOT, unit("cpr-vm@web1.service", 12.9, 13.0, "local-fs.target"))
    found = boot_path(known(*units, vms={"cpr-vm@web1.service": "web1"}), KERNEL_AT, USERSPACE_AT, 1012.6)
    assert found[-1].what == "cpr-agent.service"


def test_a_unit_that_was_restarted_since_the_boot_is_no_part_of_it() -> None:
    units = {one.name: one for one in BOOT}
    units["dbus.service"] = replace(units["dbus.service"], began_s=400.0, ended_s=401.0)
    found = boot_path(known(*units.values()), KERNEL_AT, USERSPACE_AT, 1012.6)
    assert [cost.what for cost in found][-2:] == ["local-fs.target", "cpr-agent.service"]


def test_a_host_that_says_nothing_has_no_path() -> None:
    assert boot_path(known(), KERNEL_AT, USERSPACE_AT, 1012.6) == []
    assert shutdown_path([], 0.0, 10.0, known()) == []


def test_units_that_depend_on_each_other_in_a_circle_end_the_walk() -> None:
    units = (
        unit("a.service", 3.0, 3.0, "b.service"),
        unit("b.service", 3.0, 3.0, "a.service"),
        unit(LOADS, 3.5, 0, "a.service"),
    )
    found = boot_path(known(*units), KERNEL_AT, USERSPACE_AT, 1004.0)
    assert [cost.what for cost in found] == [PID_1, "b.service", "a.service"]


STOPS = [
    UnitStop("timers.target", 10.1, 10.1),
    UnitStop("gitlab.service", 10.2, 51.2),
    UnitStop("beside.service", 10.2, 40.0),
    UnitStop("database.service", 51.3, 53.3),
    UnitStop("srv.mount", 53.4, 53.6),
]
ORDERED = (
    unit("gitlab.service", 1, 2, "database.service"),
    unit("database.service", 1, 2, "srv.mount", before=frozenset({"gitlab.service"})),
    unit("srv.mount", 1, 2),
    unit("beside.service", 1, 2),
    unit("timers.target", 1, 2),
)


def test_the_path_of_a_shutdown_goes_against_the_order_of_the_boot() -> None:
    found = shutdown_path(STOPS, 10.0, 54.0, known(*ORDERED))
    assert path(found) == [
        ("gitlab.service", 10.2, 51.2),
        ("database.service", 51.3, 53.3),
        ("srv.mount", 53.4, 53.6),
    ]
    assert [cost.waiter for cost in found] == ["database.service", "srv.mount", ""]
    assert all(cost.stops_first for cost in found)


def test_a_unit_that_was_stopped_first_and_came_back_is_not_named_again() -> None:
    found = shutdown_path(STOPS, 10.0, 54.0, known(*ORDERED), ["gitlab.service"])
    assert [cost.stops_first for cost in found] == [False, True, True]


def test_only_the_time_in_which_guests_stood_still_counts() -> None:
    found = shutdown_path(STOPS, 30.0, 53.5, known(*ORDERED))
    assert path(found) == [("gitlab.service", 30.0, 51.2), ("database.service", 51.3, 53.3)]


def test_a_unit_of_which_the_new_boot_knows_nothing_waited_for_the_last_that_was_done() -> None:
    found = shutdown_path(STOPS, 10.0, 54.0, known())
    assert [cost.what for cost in found] == ["timers.target", "gitlab.service", "database.service", "srv.mount"]
    assert not any(cost.stops_first for cost in found)


def test_the_kernels_own_part_has_the_purgatory_the_kernel_and_the_initrd() -> None:
    times = BootTimes(initrd_s=1.2, userspace_s=2.0, initrd_bytes=61 << 20)
    found = list(kernel_costs(999.0, KERNEL_AT, USERSPACE_AT, times, 80 << 20))
    assert path(found) == [(PURGATORY, 999.0, 1000.0), (KERNEL, 1000.0, 1001.2), (INITRD, 1001.2, 1002.0)]
    assert [cost.size_bytes for cost in found] == [80 << 20, 0, 61 << 20]


def test_a_kernel_without_an_initrd_takes_all_of_the_time() -> None:
    found = list(kernel_costs(0.0, KERNEL_AT, USERSPACE_AT, BootTimes(userspace_s=2.0), 0))
    assert path(found) == [(KERNEL, KERNEL_AT, USERSPACE_AT)]


def test_costs_are_those_of_the_first_guest_that_goes_on() -> None:
    times = BootTimes(initrd_s=1.0, userspace_s=4.0, initrd_bytes=1 << 20)
    began = [UnitStop("gitlab.service", T0 + 2.1, T0 + 6.5)]
    boot = (unit("slow.service", 4.1, 9.4), unit(LOADS, 9.5, 0, "slow.service"))
    (record, *_), timelines = upgrade(2, kernel_bytes=70 << 20)
    current = Replay().after(record).current
    assert current
    found = costs(current, timelines, began, times, known(*boot))
    assert found[1].size_bytes == 70 << 20
    assert [(cost.part, cost.what) for cost in found] == [
        (Part.SHUTDOWN, "gitlab.service"),
        (Part.KERNEL, PURGATORY),
        (Part.KERNEL, KERNEL),
        (Part.KERNEL, INITRD),
        (Part.BOOT, PID_1),
        (Part.BOOT, "slow.service"),
    ]
    assert found[1].begin == T0 + 6.8, "the end of the old userspace"
    assert found[-1].end == pytest.approx(T0 + 16.4 - 4.0 + 9.4)


# -- in words -------------------------------------------------------------------------------------------------------------


def said(what: str, part: Part, seconds: float, **facts: Any) -> str:
    (one,) = findings([Cost(what=what, part=part, begin=0.0, end=seconds, **facts)])
    assert one.seconds == seconds
    assert (one.severity == "warning") == bool(one.remedy)
    return f"{one.what}: {one.remedy}" if one.remedy else one.what


def test_each_is_told_in_a_sentence_with_a_remedy() -> None:
    assert said("gitlab.service", Part.SHUTDOWN, 41.0, stops_first=True) == (
        "gitlab.service took 41.0 s to stop: put it into stop-first in [upgrade] of agent.toml"
    )
    assert said("srv-backup.mount", Part.BOOT, 8.0) == (
        "srv-backup.mount took 8.00 s, and no guest needs it: "
        "add nofail to its line in /etc/fstab, so that the boot does not wait for it"
    )
    assert said("slow.service", Part.BOOT, 30.0, waiter="dbus.service") == (
        "slow.service took 30.0 s, and no guest needs it: order it After=cpr-load.service in a drop-in, and not before "
        "dbus.service"
    )
    assert said(INITRD, Part.KERNEL, 3.0, size_bytes=61 << 20).startswith(
        "the initrd (61 MiB) took 3.00 s: make the initrd"
    )
    assert "hashes 80 MiB of kernel and initrd, took 2.00 s" in said(PURGATORY, Part.KERNEL, 2.0, size_bytes=80 << 20)


@pytest.mark.parametrize(
    ("what", "part", "facts"),
    [
        ("cpr-vm@web1.service", Part.SHUTDOWN, {"needed_by": "VM web1"}),
        ("vms.mount", Part.BOOT, {"needed_by": "VM web1 (/vms/web1.qcow2)"}),
        ("systemd-tmpfiles-setup.service", Part.BOOT, {"early": True}),
        (KERNEL, Part.KERNEL, {}),
        (PID_1, Part.BOOT, {}),
    ],
)
def test_what_an_admin_can_not_help_has_no_remedy(what: str, part: Part, facts: dict[str, Any]) -> None:
    assert ": " not in said(what, part, 5.0, **facts)


def test_short_ones_are_not_worth_a_sentence_and_the_longest_comes_first() -> None:
    some = [Cost(what=f"{n}.service", part=Part.SHUTDOWN, begin=0.0, end=n) for n in (0.9, 2.0, 30.0)]
    assert [one.seconds for one in findings(some)] == [30.0, 2.0]


# -- on record ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, witness="off")
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    return bench


async def until_kexec(manager: Manager) -> None:
    manager.upgrade(UpgradeRequest(drill=True))
    await manager.ports.kexec.started.wait()  # type: ignore[attr-defined]  # the fake's


def through_a_kexec(bench: Bench) -> Job:
    bench.run(until_kexec)
    bench.reboot()
    return bench.run(lambda manager: ended(manager, manager.load_all()))


def recorded(bench: Bench) -> list[dict[str, Any]]:
    return [record for record in bench.journal() if record["event"] == COSTS]


def test_an_upgrade_leaves_its_costs_on_record_once_its_guests_run(bench: Bench) -> None:
    bench.units.times = BootTimes(initrd_s=1.0, userspace_s=3.0, initrd_bytes=5 << 20)
    bench.units.add("slow.service", began_s=3.5, ended_s=100.0)
    bench.units.add(LOADS, began_s=100.0, after=frozenset({"slow.service"}))
    through_a_kexec(bench)
    (record,) = recorded(bench)
    assert record["upgrade"] == bench.journal()[-1]["upgrade"]
    assert [cost["what"] for cost in record["costs"]][:2] == [KERNEL, INITRD]
    events = bench.records()
    assert events.index(COSTS) > events.index("upgrade-done") > events.index("resumed")


def test_a_host_without_systemd_leaves_none(bench: Bench) -> None:
    through_a_kexec(bench)
    assert recorded(bench) == []
    assert bench.records()[-1] == "upgrade-done"


def test_a_load_by_hand_leaves_none(bench: Bench) -> None:
    bench.units.add(LOADS, began_s=1.0)

    async def save_and_load(manager: Manager) -> None:
        from cpr_agent.core.model import Survives

        await ended(manager, manager.save_all(Survives.QEMU_RESTART))
        await ended(manager, manager.load_all())

    bench.run(save_and_load)
    assert recorded(bench) == []
    assert "resumed" in bench.records()


def test_a_full_disk_costs_the_record_and_no_guest(bench: Bench) -> None:
    bench.units.times = BootTimes(userspace_s=3.0)
    bench.units.add(LOADS, began_s=1.0)
    bench.run(until_kexec)
    bench.reboot()

    async def load(manager: Manager) -> Job:
        append = manager.ports.journal.append

        def full(event: str, **facts: object) -> Any:
            if event == COSTS:
                raise OSError(28, "No space left on device")
            return append(event, **facts)

        manager.ports.journal.append = full  # type: ignore[method-assign]
        return await ended(manager, manager.load_all())

    bench.run(load)
    assert recorded(bench) == []
    assert bench.qemu().status == "running"


def test_costs_are_json_that_the_journal_takes_whole(bench: Bench) -> None:
    many = [Cost(what="x" * 255, part=Part.BOOT, begin=1.0, end=2.0, needed_by="y" * 400) for _ in range(100)]

    async def append(manager: Manager) -> None:
        from msgspec import to_builtins

        manager.ports.journal.append(COSTS, upgrade="u", costs=to_builtins(many))
        await asyncio.sleep(0)

    bench.run(append)
    (record,) = recorded(bench)
    assert len(record["costs"]) == 100
    assert json.loads(json.dumps(record["costs"]))[99]["needed_by"] == "y" * 400
