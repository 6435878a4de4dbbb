# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with two NUMA nodes, each in memory of its own: real QEMUs of each generation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.lab import Guest, Lab, refused


def running(lab: Lab) -> Guest:
    guest = lab.numa_guest()
    guest.start()
    guest.until_counts()
    return guest


def test_it_goes_on_where_it_was(each_lab: Lab) -> None:
    guest = running(each_lab)
    nodes = guest.admin("query-memdev")
    assert sorted((node["id"], node["size"], node["share"]) for node in nodes) == [
        ("cpr-ram-0", 8 << 20, True),
        ("cpr-ram-1", 8 << 20, True),
    ]
    cpus = guest.admin("query-cpus-fast")
    assert [cpu["props"]["node-id"] for cpu in cpus] == [0, 1]
    descriptors = Path(f"/proc/{guest.pid}/fd")
    assert [str((descriptors / number).readlink()) for number in ("10", "14")] == [str(ram) for ram in guest.rams]
    for _ in range(2):
        guest.save()
        assert guest.properties["Checkpoint"]["size"] < 2 << 20  # none of the RAM is in it
        guest.call("Stop", "s", "hard")
        guest.load()
        guest.assert_unbroken()
    guest.call("Refresh", "a{sv}", {})
    guest.assert_unbroken()
    guest.save()
    guest.call("Resume")
    guest.assert_unbroken()


def test_it_is_shown_as_it_is(lab: Lab) -> None:
    guest = running(lab)
    memory = guest.properties["Memory"]
    assert (memory["size"], memory["survives"]) == (16 << 20, "qemu-restart")
    assert [(node["device"], node["size"], node["offset"]) for node in memory["nodes"]] == [
        (str(ram), 8 << 20, 0) for ram in guest.rams
    ]
    shown = lab.cprctl("status", "web1").stdout
    for ram in guest.rams:
        assert f"8M of {ram} from 0" in shown
        assert str(ram) in lab.cprctl("list").stdout
        assert f"Its RAM is in {ram} (tmpfs), which a kexec erases" in lab.cprctl("check", "web1").stdout


def test_neither_may_be_anothers(lab: Lab) -> None:
    guest = running(lab)
    for number, ram in enumerate(guest.rams):
        other = lab.guest(f"other{number}", device=str(ram), size="8M")
        refused(other, "MemoryOverlap", "overlaps that of VM web1", member="Start")
    guest.assert_unbroken()
    same = lab.numa_guest("same")
    same.definition["memory"]["node"][1]["device"] = str(same.rams[0])
    lab.define(same)
    refused(same, "MemoryOverlap", "its NUMA nodes 0 and 1 are on the same memory", member="Start")


def test_a_second_file_that_cannot_be_made(lab: Lab) -> None:
    guest = lab.numa_guest()
    guest.definition["memory"]["node"][1]["device"] = str(lab.shm / "nowhere/ram")
    lab.define(guest)
    refused(guest, "DeviceMissing", "nowhere/ram cannot be found", member="Start")
    assert guest.pid == 0


def test_memory_that_qemu_got_behind_the_agents_back(lab: Lab) -> None:
    """An admin plugs some in."""
    guest = running(lab)
    backend = {"qom-type": "memory-backend-ram", "id": "more", "size": 16 << 20}
    guest.admin("object-add", **backend)
    refused(guest, "Blocked", "memory backend more is private", member="CprSave")
    guest.admin("object-del", id="more")
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_a_checkpoint_of_an_agent_of_before_there_were_nodes(lab: Lab) -> None:
    """One that this agent wrote, written again as the older one did it."""
    guest = lab.running("web1")
    guest.save()
    guest.call("Stop", "s", "hard")
    lab.end_agent()
    path = guest.checkpoint / "manifest.json"
    path.write_bytes(as_schema_1(path.read_bytes()))
    lab.start_agent()
    guest.load()
    guest.assert_unbroken()


def as_schema_1(envelope: bytes) -> bytes:
    manifest = json.loads(envelope)["manifest"]
    launch = manifest["launch"]
    for body in (manifest, launch):
        (body["memory"],) = body["memory"]
        del body["memory"]["volume"]
    (launch["node"],), (launch["memory_fd"],) = launch.pop("nodes"), launch.pop("memory_fds")
    manifest["schema"] = 1
    body = json.dumps(manifest, separators=(",", ":"))
    return (
        json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()[:-1] + f', "manifest":{body}}}'.encode()
    )
