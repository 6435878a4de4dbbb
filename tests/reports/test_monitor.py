# SPDX-License-Identifier: GPL-2.0-or-later
"""What a monitor has changed in a QEMU and its guest does not see: it goes along, or check says that it does not."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab import Guest, Lab, without_capital
from tests.reports.test_live import assert_goes_on, assert_refused, blocks, image, warned, with_disk

UNLIMITED = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


def limits(guest: Guest) -> dict[str, Any]:
    disk = next(one["inserted"] for one in guest.admin("query-block") if "inserted" in one)
    return {name: value for name, value in disk.items() if name.startswith(("bps", "iops", "group")) and value}


def lost(guest: Guest) -> list[str]:
    return [without_capital(found["what"]) for found in guest.call("Check") if found["code"] == "not-carried"]


@pytest.mark.parametrize("by", ["drive", "blockdev"])
def test_a_throttle_goes_along(each_lab: Lab, by: str) -> None:
    path = image(each_lab.root / "disk.qcow2")
    if by == "drive":
        guest, place = with_disk(each_lab, path), {"device": "d0"}
    else:
        nodes = f"driver=qcow2,node-name=d0,file.driver=file,file.filename={path}"
        devices = ("-device", "ahci,id=a0", "-device", "ide-hd,id=disk0,drive=d0,bus=a0.0")
        guest, place = each_lab.running("web1", "-blockdev", nodes, *devices), {"id": "disk0"}
    wanted = {"iops": 100, "bps": 1 << 40, "bps_max": 1 << 41, "bps_max_length": 3, "iops_size": 4096, "group": "noisy"}
    guest.admin("block_set_io_throttle", **{**UNLIMITED, **wanted, **place})
    assert [("throttle of disk" in what, "iops=100" in what) for what in warned(guest)] == [(True, True)]
    assert lost(guest) == []
    for _ in range(2):
        assert_goes_on(guest)
        assert limits(guest) == wanted
    guest.call("Refresh", "a{sv}", {})
    assert limits(guest) == wanted
    guest.admin("block_set_io_throttle", **UNLIMITED, **place)
    assert [("throttle of disk" in what, "is not there" in what) for what in lost(guest)] == [(True, True)]
    assert_goes_on(guest)
    assert limits(guest) == {}


def add_object(guest: Guest) -> str:
    guest.admin("object-add", id="io1", **{"qom-type": "iothread"})
    return "object io1 was not there, is iothread"


def add_chardev(guest: Guest) -> str:
    guest.admin("chardev-add", id="c1", backend={"type": "null", "data": {}})
    return "character device c1 was not there, is null"


def add_bitmap(guest: Guest) -> str:
    node = guest.admin("query-block")[0]["inserted"]["node-name"]
    guest.admin("block-dirty-bitmap-add", node=node, name="b1")
    return f"dirty bitmap b1 of {node} was not there, is in QEMU's memory alone"


def export(guest: Guest) -> str:
    node = guest.admin("query-block")[0]["inserted"]["node-name"]
    address = {"type": "unix", "data": {"path": str(guest.lab.root / "nbd")}}
    guest.admin("nbd-server-start", addr=address)
    guest.admin("block-export-add", type="nbd", id="e1", **{"node-name": node})
    return f"export e1 was not there, is nbd of {node}"


def limit_group(guest: Guest) -> str:
    guest.admin("qom-set", path="/objects/tg", property="limits", value={"iops-total": 20})
    return "object tg was throttle-group iops-total=10, is throttle-group iops-total=20"


def forward_port(guest: Guest) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    guest.admin("human-monitor-command", **{"command-line": f"hostfwd_add n0 tcp:127.0.0.1:{port}-:22"})
    return f"host forward tcp 127.0.0.1:{port} of n0 to 10.0.2.15:22 was not there, is a forwarded port"


CHANGES = (add_object, add_chardev, add_bitmap, export, limit_group, forward_port)


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_go_along_is_said(each_lab: Lab, change: Callable[[Guest], str]) -> None:
    """Each is lost with its QEMU, and the guest is the same: that is for an admin to know, and no reason against a save."""
    more = ("-object", "throttle-group,id=tg,x-iops-total=10", "-netdev", "user,id=n0", "-device", "e1000,netdev=n0")
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"), "qcow2", *more)
    assert lost(guest) == []
    said = change(guest)
    assert lost(guest) == [said]
    assert blocks(guest) == []
    assert_goes_on(guest)
    assert lost(guest) == []


@pytest.mark.parametrize("driver", ["copy-on-read", "null-co"])
def test_a_node_that_no_disk_has_is_no_obstacle(each_lab: Lab, driver: str) -> None:
    """Backup programs leave the targets of their jobs, and filters on top of disks."""
    guest = with_disk(each_lab, image(each_lab.root / "disk.qcow2"))
    node = guest.admin("query-block")[0]["inserted"]["node-name"]
    on_top = {"file": node} if driver == "copy-on-read" else {}
    guest.admin("blockdev-add", driver=driver, **{"node-name": "left"}, **on_top)
    assert_goes_on(guest)


@pytest.mark.parametrize("name", ["return-path", "pause-before-switchover", "dirty-bitmaps", "compress"])
def test_a_capability_that_a_save_would_fail_with_is_told(each_lab: Lab, name: str) -> None:
    """A migration that was given up has left it on."""
    guest = each_lab.running("web1")
    if name not in [one["capability"] for one in guest.admin("query-migrate-capabilities")]:
        pytest.skip("only older QEMUs have it")
    guest.admin("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])
    assert_refused(guest, f"the migration capability {name} is on: turn it off")
    guest.admin("migrate-set-capabilities", capabilities=[{"capability": name, "state": False}])
    assert_goes_on(guest)


def test_credentials_of_a_migration_that_were_left_are_told(each_lab: Lab) -> None:
    guest = each_lab.running("web1")
    guest.admin("migrate-set-parameters", **{"tls-creds": "tls0"})
    assert_refused(guest, "tls-creds")
    guest.admin("migrate-set-parameters", **{"tls-creds": ""})
    assert_goes_on(guest)


@pytest.mark.parametrize("kind", ["user", "socket"])
def test_a_network_that_was_added_is_told_before_a_save(each_lab: Lab, kind: str) -> None:
    """That of QEMU's own NAT has a part in the state: the load would be refused for ever."""
    more = ("-netdev", "user,id=n0", "-device", "e1000,netdev=n0")
    guest = each_lab.running("web1", *more)
    assert_goes_on(guest)
    guest.admin("netdev_add", type=kind, id="n1", **({"listen": "127.0.0.1:0"} if kind == "socket" else {}))
    assert_refused(guest, f"network n1 was not there, is {kind}")
    guest.admin("netdev_del", id="n1")
    assert_goes_on(guest)


def test_an_object_with_a_state_is_told_before_a_save(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-chardev", "null,id=c0", "-netdev", "hubport,id=n0,hubid=0")
    guest.admin("object-add", id="f0", netdev="n0", maxlen=1, file=f"{each_lab.root}/dump", **{"qom-type": "filter-dump"})
    assert_refused(guest, "object f0 was not there, is filter-dump")


def test_a_password_that_was_set_on_the_monitor_is_told(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-vnc", f"unix:{each_lab.root}/vnc.sock,password=on")
    assert lost(guest) == ["its password for VNC was set on the monitor"]
    assert_goes_on(guest)
