# SPDX-License-Identifier: GPL-2.0-or-later
"""What a monitor has changed in a QEMU: read, compared, carried over or told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.checks import check_vm
from cpr_agent.core.model import Part, Throttle
from cpr_agent.core.vm import Vm
from cpr_agent.errors import Blocked, QemuRefused
from cpr_agent.vm.cmdline import password_displays
from cpr_agent.vm.inventory import host_forwards, networks, throttles
from cpr_agent.vm.replies import BlockBackend, Limits
from tests.bench import Bench

LIMITED = Throttle(disk="d0", by="device", group="d0", limits={"iops": 100})


def test_only_what_limits_is_a_throttle() -> None:
    found = throttles(
        [
            BlockBackend(device="d0", qdev="disk0", inserted=Limits(group="g", iops=100, iops_size=4096)),
            BlockBackend(device="d1", inserted=Limits()),
            BlockBackend(device="cd"),
            BlockBackend(qdev="disk2", inserted=Limits(group="g", bps_max=7)),
        ]
    )
    assert list(found) == [
        Throttle(disk="d0", by="device", group="g", limits={"iops": 100, "iops_size": 4096}),
        Throttle(disk="disk2", by="id", group="g", limits={"bps_max": 7}),
    ]


def test_networks_are_found_in_what_a_human_reads() -> None:
    """As QEMU 7.2 to 11.1 say it; line feeds are escapes by then (cpr_agent.text)."""
    said = (
        r"hub 0\r\n \ h0\r\ne1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n"
        r" \ n0: index=0,type=user,net=10.0.2.0,restrict=off\r\nn1: index=0,type=vhost-user,x\r\n"
    )
    assert list(networks(said)) == [
        Part(name="network n0", kind="user", leads_to="net=10.0.2.0 restrict=off"),
        Part(name="network n1", kind="vhost-user", leads_to=""),
    ]


def test_forwarded_ports_are_found_in_what_a_human_reads() -> None:
    """As QEMU 7.2 says it. Connections come and go by themselves."""
    head = r"  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    said = (
        rf"Hub -1 (net0):\r\n{head}"
        r"  TCP[HOST_FORWARD]  12               *  5558       10.0.2.15    81     0     0\r\n"
        r"  TCP[ESTABLISHED]   14       127.0.0.1  5558       10.0.2.15    81     0     0\r\n"
        rf"Hub -1 (net1):\r\n{head}"
        r"  UDP[HOST_FORWARD]  11       127.0.0.1  5556       10.0.2.15    53     0     0\r\n"
        r"  UDP[236 sec]       15       10.0.2.15 33070        10.0.2.3    53     0     0\r\n"
    )
    assert [name for name, _ in host_forwards(said)] == [
        "host forward tcp *:5558 of net0 to 10.0.2.15:81",
        "host forward udp 127.0.0.1:5556 of net1 to 10.0.2.15:53",
    ]


@pytest.mark.parametrize(
    ("arguments", "displays"),
    [
        (("-vnc", "unix:/x,password=on"), ["VNC"]),
        (("-vnc", ":0,password"), ["VNC"]),
        (("-vnc", ":0,password=off"), []),
        (("-vnc", ":0"), []),
        (("-vnc", ":0,password=on,password-secret=s"), []),
        (("-spice", "port=1"), ["SPICE"]),
        (("-spice", "port=1,disable-ticketing=on"), []),
        (("-spice", "port=1,disable-ticketing"), []),
        (("-spice", "port=1,password=x"), []),
        (("-spice", "port=1,password-secret=s"), []),
    ],
)
def test_displays_whose_password_is_set_on_the_monitor(arguments: tuple[str, ...], displays: list[str]) -> None:
    assert password_displays(("qemu", *arguments)) == displays


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    return bench


def said(bench: Bench, code: str) -> list[str]:
    async def check(vm: Vm) -> list[str]:
        await vm.refresh()
        return [found.what for found in await check_vm(vm, vm.machine.ports, [], {}) if found.code == code]

    return bench.vm(check)


def test_a_part_that_was_added_is_told(bench: Bench) -> None:
    assert said(bench, "not-carried") == []
    bench.runner.parts["web1"] = [Part(name="object io1", kind="iothread")]
    assert said(bench, "not-carried") == ["object io1 was not there, is iothread"]
    assert said(bench, "blocked") == []
    bench.runner.parts["web1"] = [Part(name="host forward tcp *:5558 of net0 to 10.0.2.15:81", kind="a forwarded port")]
    assert said(bench, "not-carried") == [
        "host forward tcp *:5558 of net0 to 10.0.2.15:81 was not there, is a forwarded port"
    ]
    assert said(bench, "blocked") == []


def test_one_that_may_have_a_state_blocks_a_save(bench: Bench) -> None:
    bench.runner.parts["web1"] = [Part(name="network n1", kind="user")]
    assert said(bench, "not-carried") == []
    assert ["network n1 was not there, is user" in what for what in said(bench, "blocked")] == [True]

    async def save(vm: Vm) -> None:
        await vm.refresh()
        await vm.save(SaveRequest())

    with pytest.raises(Blocked, match="network n1 was not there, is user; it may have a part in QEMU's state"):
        bench.vm(save)


def test_of_an_agent_that_recorded_no_parts_nothing_is_told(bench: Bench) -> None:
    recorded = bench.runner.inventories["web1"]
    bench.runner.inventories["web1"] = replace(recorded, parts=None)
    bench.runner.parts["web1"] = [Part(name="network n1", kind="user")]
    assert said(bench, "not-carried") == []
    assert said(bench, "blocked") == []


def test_a_throttle_goes_along_or_that_is_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.runner.throttled["web1"] = (LIMITED,)
    assert said(bench, "carried-over") == ["throttle of disk d0 was not there, is iops=100"]
    asked = bench.runner.throttled

    async def save_and_load(vm: Vm) -> None:
        await vm.refresh()
        await vm.save(SaveRequest())
        asked.pop("web1")
        await vm.load(LoadRequest())
        await vm.machine.settled()

    bench.vm(save_and_load)
    assert asked["web1"] == (LIMITED,)
    assert said(bench, "carried-over") == []
    bench.runner.faults["web1", "throttle"] = QemuRefused("no such disk", vm="web1")
    with caplog.at_level(logging.WARNING):
        bench.vm(save_and_load)
    assert "VM web1: its disks have not the limits that they had: no such disk" in caplog.text
    assert bench.qemu().status == "running"


def test_a_throttle_that_was_taken_off_comes_back_with_a_load(bench: Bench) -> None:
    bench.runner.inventories["web1"] = replace(bench.runner.inventories["web1"], throttles=(LIMITED,))
    assert said(bench, "not-carried") == ["throttle of disk d0 was iops=100, is not there"]
