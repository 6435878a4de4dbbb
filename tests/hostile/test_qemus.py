# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that its guest has taken over, beside guests that nobody has: its trouble stays its own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cpr_agent.bus.client import CallError
from tests.hostile.conftest import Evil, agent_pid, assert_contained, figure, rss_mib
from tests.lab import Guest, Lab, script, until

DOCUMENTED = {
    *("Blocked", "QemuFailed", "SaveFailed", "LoadFailed", "WrongState", "AlreadyRunning", "AlreadySaved", "NoCheckpoint"),
    *("NotVmstate", "MemoryChanged", "MachineChanged", "DiskChanged", "CheckpointUnreadable", "GuestAgentFailed", "Busy"),
    *("ProofFailed", "InvalidDefinition", "QemuRefused", "QemuUnreachable", "QemuEnded"),
}
"""What may come of an act on the VM whose QEMU lies."""


def answer(command: str, text: str) -> dict[str, Any]:
    return {"on": command, "answer": text}


IN_A_CIRCLE = {
    "nodes": [{"id": 1, "type": "block-backend", "name": "d0"}, {"id": 2, "type": "block-driver", "name": "n"}],
    "edges": [
        {"parent": parent, "child": 2, "name": name} for parent, name in ((1, "root"), (2, "x" * 4096), (2, "y" * 4096))
    ],
}
MANY = [{"name": f"d{number}", "type": "child<virtio-net-pci>"} for number in range(20_000)]
LIES = {
    "a NUL in the run state": answer("query-status", '{"status": "running\\u0000"}'),
    "a surrogate in the run state": answer("query-status", '{"status": "\\ud800"}'),
    "an escape in the run state": answer("query-status", '{"status": "\\u001b[2J[bold]"}'),
    "a NUL in a blocker": answer("query-migrate", '{"blocked-reasons": ["x\\u0000y"]}'),
    "a surrogate in a blocker": answer("query-migrate", '{"blocked-reasons": ["x\\ud800y"]}'),
    "a bidi mark in a blocker": answer("query-migrate", '{"blocked-reasons": ["x\\u202ey"]}'),
    "a run state that is none": answer("query-status", "{}"),
    "a list for the run state": answer("query-status", "[]"),
    "a number for jobs": answer("query-jobs", "5"),
    "capabilities without names": answer("query-migrate-capabilities", "[{}]"),
    "words for memory backends": answer("query-memdev", '["x"]'),
    "no CPU at all": answer("query-cpus-fast", "[]"),
    "a disk larger than numbers go": answer(
        "query-named-block-nodes",
        '[{"node-name": "n", "drv": "raw", "file": "nbd:x", "image": {"virtual-size": 1180591620717411303424}}]',
    ),
    "a disk with a NUL in its path": answer(
        "query-named-block-nodes",
        '[{"node-name": "n", "drv": "raw", "file": "/x\\u0000y", "image": {"virtual-size": 1}}]',
    ),
    "a version with a surrogate": answer(
        "query-version", '{"qemu": {"major": 7, "minor": 2, "micro": 1}, "package": "\\ud800"}'
    ),
    "a version of negative numbers": answer(
        "query-version", '{"qemu": {"major": -7, "minor": 2, "micro": 1}, "package": ""}'
    ),
    "a stop that was never": {"on": "event:STOP", "timestamp": '{"seconds": NaN, "microseconds": 0}'},
    "a stop at the end of time": {"on": "event:STOP", "timestamp": '{"seconds": 1e300, "microseconds": 0}'},
    "a stop before time": {"on": "event:STOP", "timestamp": '{"seconds": 1, "microseconds": 0}'},
    "a stop without a time": {"on": "event:STOP", "timestamp": "[]"},
    "an end without a status": {"on": "event:MIGRATION", "timestamp": "{}"},
    "a disk below itself": answer("x-debug-query-block-graph", json.dumps(IN_A_CIRCLE)),
    "devices without number": answer("qom-list", json.dumps(MANY)),
    "jobs without number": answer("query-jobs", json.dumps([{"id": "x" * 40}] * 20_000)),
    "lists in each other": answer("query-status", "[" * 5000 + "]" * 5000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_is_the_liars_own_trouble(lab: Lab, evil: Evil, good: Guest, lie: dict[str, Any]) -> None:
    """The others are listed, checked, saved and loaded, and the agent starts again."""
    saved = lab.running("saved1")
    saved.save()
    evil().lie(lie)
    lab.client(lambda client: client.manager("Reload"))
    assert good.call("Check")
    managed = lab.client(
        lambda client: client.call("/org/cpragent1", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    )
    assert {path.rpartition("/")[2] for path in managed if "/vm/" in path} == {"evil", "good", "saved1"}
    assert str(managed).isprintable()
    assert lab.job("SaveAll", survives="qemu-restart", policy="force") in ("done", "nothing to do")
    assert good.state == "saved"
    assert lab.job("LoadAll") is not None
    until(lambda: (good.state, saved.state) == ("running", "running"), "the others are loaded")
    assert lab.end_agent() == 0
    lab.start_agent()
    assert (good.state, saved.state) == ("running", "running")
    assert_contained(lab, good, saved)


def test_no_path_that_qemu_names_is_touched(lab: Lab, evil: Evil, good: Guest) -> None:
    """Names of sockets that it does not have: another VM's manifest, any file, and what looks like one of ours."""
    good.save()
    good.call("Stop", "s", "hard")
    manifest = good.checkpoint / "manifest.json"
    other, kept = lab.root / "any-file", lab.root / "deleted.of-1"
    for path in (other, kept):
        path.write_text("precious")
    liar = evil()
    named = [
        {"label": f"x{path.name}", "filename": f"unix:{path},server=on"} for path in (manifest, other, lab.root / "deleted")
    ]
    liar.lie({"on": "query-chardev", "add": [{**one, "frontend-open": False} for one in named]})
    liar.guest.call("Refresh", "a{sv}", {})
    assert manifest.exists()
    assert (other.read_text(), kept.read_text()) == ("precious", "precious")
    lab.client(lambda client: client.manager("Reload"))
    with pytest.raises(CallError, match="saved"):
        good.start()
    good.load()
    assert_contained(lab, good, liar.guest)


EVENT = '{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "%s", "data": {%s}}\r\n'
FLOODS = {
    "events that are unknown": EVENT % ("X", ""),
    "events that matter": EVENT % ("STOP", ""),
    "a message without end": "x" * 65536,
    "events of megabytes": EVENT % ("X", f'"a": "{"y" * (8 << 20)}"'),
    "answers to no question": '{"return": {}, "id": "x"}\r\n',
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_costs_others_next_to_nothing(lab: Lab, evil: Evil, good: Guest, flood: str) -> None:
    good.save()
    good.load()
    liar = evil()
    liar.lie({"on": "query-status", "flood": flood})
    before = saved_in_s(lab)
    with pytest.raises(CallError):  # its own act is answered, by whatever it comes to
        liar.guest.save()
    good.save()
    figure(f"pause of a good VM beside it (alone {before:.3f} s)", saved_in_s(lab), max(1.5 * before, before + 0.5), "s")
    good.load()
    assert_contained(lab, good)


def saved_in_s(lab: Lab) -> float:
    """How long the last guest stood still for its save, by the agent's log."""
    lines = [line for line in lab.log.read_text().splitlines() if ": saved in " in line]
    return float(lines[-1].partition(": saved in ")[2].split()[0])


PANIC_IN_A_LOOP = bytes.fromhex("ba0505b002eeebfd")
"""mov dx,0x505; mov al,2 (GUEST_CRASHLOADED, which QEMU does not limit); out dx,al; jmp -3"""
RESET_IN_A_LOOP = bytes.fromhex("baf90cb006eeebfe")


@pytest.mark.parametrize("code", [PANIC_IN_A_LOOP, RESET_IN_A_LOOP], ids=["panics", "resets"])
def test_a_guest_alone_cannot_make_the_agent_grow(lab: Lab, good: Guest, code: bytes) -> None:
    """QEMU is not compromised here: its guest does what a guest may."""
    disk = lab.root / "boot.img"
    disk.write_bytes(code + bytes(510 - len(code)) + b"\x55\xaa" + bytes(1 << 20))
    guest = lab.guest("loop", "-device", "pvpanic", "-action", "panic=none", "-drive", f"file={disk},format=raw,if=virtio")
    words = guest.definition["vm"]["arguments"]
    del words[words.index("-kernel") : words.index("-kernel") + 2]
    guest.definition["memory"]["size"] = "64M"
    lab.define(guest)
    guest.start()
    deadline = time.monotonic() + 20
    until(lambda: time.monotonic() > deadline or rss_mib(lab) > 120, "twenty seconds of it")
    good.save()
    good.load()
    guest.save()
    assert guest.state == "saved"
    assert_contained(lab, good)


def test_a_silent_qemu_does_not_keep_the_agent_from_starting(lab: Lab, evil: Evil, good: Guest) -> None:
    evil().lie({"on": "greeting", "silent": True}, {"on": "*", "silent": True})
    lab.end_agent()
    lab.start_agent()  # how long that takes is in test_figures.py
    assert good.state == "running"
    assert_contained(lab, good)


@pytest.mark.parametrize("size", [3 << 30, 15 << 40], ids=["3 GiB", "15 TiB"])
def test_a_state_that_is_mostly_a_hole_is_refused(lab: Lab, evil: Evil, good: Guest, size: int) -> None:
    """It costs QEMU nothing to make its file that large; reading it would cost others their time."""
    liar = evil()
    liar.lie({"on": "event:MIGRATION", "state": size})
    began = time.monotonic()
    lab.job("SaveAll", survives="qemu-restart", policy="force")
    assert time.monotonic() - began < 30
    good.load()
    assert_contained(lab, good)


def test_a_state_full_of_beginnings_is_looked_through_in_no_time(lab: Lab, evil: Evil, good: Guest) -> None:
    """Each of these bytes could begin the description at the end of a state."""
    liar = evil()
    liar.lie({"on": "event:MIGRATION", "appended": 64 << 20})
    before = time.monotonic()
    lab.job("SaveAll", survives="qemu-restart", policy="force")
    assert time.monotonic() - before < 30
    good.load()
    assert_contained(lab, good)


SLOW_S = 28.0


@pytest.mark.parametrize("policy", ["all-or-nothing", "force"])
@pytest.mark.parametrize("when", ["from the beginning", "once guests stand still"])
def test_slow_answers_leave_no_other_guest_stopped(lab: Lab, evil: Evil, good: Guest, policy: str, when: str) -> None:
    """Each comes just before it would be too late. The VM is given up, by the policy."""
    liar = evil()
    on = "*" if when == "from the beginning" else "event:STOP"
    liar.lie({"on": on, "slow": SLOW_S})
    result = lab.job("SaveAll", survives="qemu-restart", policy=policy)
    if policy == "force":
        assert result == "done"
        assert good.state == "saved"
        assert lab.job("LoadAll") == "done"
    else:
        assert "evil" in result
    until(lambda: good.state == "running", "it goes on")
    assert longest_standstill_s(good) < 40  # of its budget, of the undo, and of what a slow machine takes
    assert_contained(lab, good)


def longest_standstill_s(guest: Guest) -> float:
    """By the journal of the agent: from each stop to the next start."""
    longest, stopped = 0.0, 0.0
    for line in (guest.lab.state / "journal").read_bytes().splitlines():
        record = json.loads(line.partition(b" ")[2])
        if record.get("vm") == guest.name and record["event"] == "save-begin":
            stopped = record["at"]
        elif record.get("vm") == guest.name and record["event"] == "resumed" and stopped:
            longest, stopped = max(longest, record["at"] - stopped), 0.0
    return longest


def test_a_firmware_file_that_became_a_fifo_is_not_waited_for(lab: Lab, good: Guest) -> None:
    rom = lab.root / "rom"
    rom.write_bytes(bytes(65536))
    guest = lab.running("evil", "-device", f"virtio-net-pci,romfile={rom}")
    rom.unlink()
    os.mkfifo(rom)
    assert lab.job("SaveAll", survives="qemu-restart") == "done"
    assert longest_standstill_s(good) == 0.0
    lab.job("LoadAll")
    until(lambda: good.state == "running", "it goes on")
    assert longest_standstill_s(good) < 15
    assert guest.state in ("saved", "held", "running", "stopped")
    assert_contained(lab, good)


def test_memory_that_its_owner_cuts_off_ends_no_agent(lab: Lab, good: Guest) -> None:
    """Root must not touch a mapping beyond its end (SIGBUS). QEMU itself does as soon as its guest runs."""
    guest = lab.running("evil")
    guest.call("Stop", "s", "hard")
    guest.start()
    guest.until_counts()
    guest.save()
    os.truncate(guest.ram, 4096)
    for act in (guest.load, lambda: guest.call("Resume"), lambda: guest.call("Check"), guest.start):
        with contextlib.suppress(CallError):
            act()
    lab.job("SaveAll", survives="qemu-restart", policy="force")
    good.load()
    assert_contained(lab, good)


COMMANDS = (
    *("query-status", "query-version", "query-commands", "query-machines", "query-qmp-schema", "query-cpus-fast"),
    *("query-cpu-model-expansion", "query-tpm", "query-current-machine", "query-pci", "qom-list", "qom-get"),
    *("query-memdev", "query-named-block-nodes", "query-jobs", "query-replay", "query-colo-status"),
    *("query-migrate-capabilities", "query-migrate-parameters", "query-migrate", "query-chardev", "add-fd", "getfd"),
    *("migrate", "migrate-set-capabilities", "migrate-set-parameters", "cont", "stop", "migrate_cancel"),
)
"""All that the agent sends to a QEMU that runs."""
NONSENSE = ("null", "[]", "{}", '"\\ud800\\u0000"', "-1", "1e999", '[{"a": {}}]', '{"status": {}}')


@pytest.mark.parametrize("command", COMMANDS)
def test_nonsense_for_any_answer_is_an_error_of_that_vm(lab: Lab, evil: Evil, good: Guest, command: str) -> None:
    liar = evil()
    for nonsense in NONSENSE:
        liar.lie(answer(command, nonsense))
        for act in (liar.guest.save, liar.guest.load, lambda: liar.guest.call("Check"), lambda: liar.guest.properties):
            try:
                act()
            except CallError as error:
                assert error.kind in DOCUMENTED, f"{command} {nonsense}: {error.kind} {error}"
    liar.lie()
    assert lab.job("SaveAll", survives="qemu-restart", policy="force") in ("done", "nothing to do")
    good.load()
    assert_contained(lab, good)


EVENTS = ("STOP", "RESUME", "SUSPEND", "WAKEUP", "SHUTDOWN", "MIGRATION")
SHAPES = ('"data": {"status": "%s"}', '"data": []', '"data": {"status": 5}', '"timestamp": 7', '"event2": {}')


@pytest.mark.parametrize("event", EVENTS)
def test_events_of_any_shape_are_that_vms_trouble(lab: Lab, evil: Evil, good: Guest, event: str) -> None:
    """Those that matter to the agent, at any time, and told of again and again."""
    liar = evil()
    for shape in SHAPES:
        text = f'{{"timestamp": {{"seconds": 1, "microseconds": 2}}, "event": "{event}", '
        text += shape.replace("%s", "completed") + "}\r\n"
        liar.lie({"on": "query-status", "said": text * 3})
        for act in (liar.guest.save, liar.guest.load, lambda: liar.guest.properties):
            try:
                act()
            except CallError as error:
                assert error.kind in DOCUMENTED, f"{event} {shape}: {error.kind} {error}"
    liar.lie()
    assert lab.job("SaveAll", survives="qemu-restart", policy="force") in ("done", "nothing to do")
    good.load()
    assert_contained(lab, good)


def test_looks_that_take_their_time_do_not_pile_up(lab: Lab, evil: Evil, good: Guest) -> None:
    """Each look is slow, and brings events that ask for more looks. An act waits for one of them, and not for all."""
    liar = evil()
    stamp = f'{{"seconds": {int(time.time())}, "microseconds": 2}}'
    said = [f'{{"timestamp": {stamp}, "event": "{event}", "data": {{}}}}\r\n' for event in EVENTS]
    liar.lie({"on": "query-status", "slow": 2.0, "said": "".join(said)})
    lab.client(lambda client: client.manager("Reload"))
    deadline = time.monotonic() + 20
    until(lambda: time.monotonic() > deadline, "twenty seconds of it")
    began = time.monotonic()
    with contextlib.suppress(CallError):
        liar.guest.call("Stop", "s", "hard")
    figure("the wait of its admin", time.monotonic() - began, 25, "s")
    good.save()
    good.load()
    assert_contained(lab, good)


def test_a_process_may_call_itself_what_it_likes(lab: Lab, good: Guest) -> None:
    """By prctl(2), whenever QEMU likes; here by the name that it is started by, which is no UTF-8."""
    named = lab.root / os.fsdecode(b"\xff) Z\nUid:\t1")
    named.symlink_to(lab.qemu)
    start = f"#!{sys.executable}\nimport os, sys\nos.execv({os.fsencode(named)!r}, sys.argv)\n"
    guest = lab.guest("evil", qemu=script(lab.root / "evil-qemu", start))
    guest.start()
    guest.until_counts()
    assert Path(f"/proc/{guest.pid}/comm").read_bytes().startswith(b"\xff) Z")
    for _ in range(2):
        guest.save()
        guest.load()
        assert lab.end_agent() == 0
        lab.start_agent()
    assert (guest.state, good.state) == ("running", "running")
    assert_contained(lab, good, guest)


def test_another_vms_socket_in_the_place_of_its_own_is_refused(lab: Lab, good: Guest) -> None:
    """A VM's user owns the directory of its sockets."""
    guest = lab.running("evil")
    lab.end_agent()
    own = lab.run / "vm/evil/agent.sock"
    own.rename(own.with_name("away"))
    for target in (lab.run / "vm/good/agent.sock", Path("/run/dbus/system_bus_socket")):
        own.symlink_to(target)
        lab.start_agent()
        assert guest.state == "unreachable"
        assert good.state == "running"
        lab.end_agent()
        own.unlink()
    own.with_name("away").rename(own)
    lab.start_agent()
    assert guest.state == "running"
    assert agent_pid(lab)
    assert_contained(lab, good, guest)
