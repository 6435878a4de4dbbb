# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus surface and cprctl, as callers see them: introspection, authorization, bad requests, exit codes, busctl."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cpr_agent.bus.client import CallError, Client
from cpr_agent.bus.contract import read_contract
from cpr_agent.bus.library import Message, Variant
from tests.lab import DAEMON, PATIENCE_S, Lab, let_others_in, private_bus, until

ROOT = "/org/cpragent1"
SAMPLES = {"s": "x", "a{sv}": {}}


def in_signature(signature: str) -> list[str]:
    return [part for part in (signature.replace("a{sv}", " a{sv} ").replace("s", " s ").split()) if part]


def call(lab: Lab, path: str, interface: str, member: str, signature: str = "", *body: object) -> object:
    return lab.client(lambda client: client.call(path, interface, member, signature, *body))


def test_live_introspection_is_the_contract(lab: Lab) -> None:
    lab.guest()
    contract = read_contract()
    for path, name in ((ROOT, "org.cpragent1.Manager"), (f"{ROOT}/vm/web1", "org.cpragent1.VM")):
        xml = str(call(lab, path, "org.freedesktop.DBus.Introspectable", "Introspect"))
        live = {e.attrib["name"]: e for e in ElementTree.fromstring(xml).iter("interface")}  # noqa: S314 - our own
        assert ElementTree.canonicalize(ElementTree.tostring(live[name])) == ElementTree.canonicalize(
            ElementTree.tostring(contract[name].xml)
        )
    assert '<node name="web1" />' in str(call(lab, f"{ROOT}/vm", "org.freedesktop.DBus.Introspectable", "Introspect"))


DENIED = """
import asyncio, json, os, sys
from cpr_agent.bus.client import CallError, Client
os.setgroups([]); os.setgid(65534); os.setuid(65534)

async def main():
    out = {}
    async with Client.connected(sys.argv[1]) as client:
        for path, interface, member in json.load(sys.stdin):
            try:
                await client.call(path, interface, member)
                out[f"{path} {interface}.{member}"] = "allowed"
            except CallError as error:
                out[f"{path} {interface}.{member}"] = f"{error.kind}: {error}"
    print(json.dumps(out))

asyncio.run(main())
"""


def test_another_user_is_denied_everything_before_its_arguments_are_looked_at(lab: Lab) -> None:
    """No polkit on this bus, so every method must fail closed; the arguments are all missing, and nobody complains."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    guest = lab.running()
    calls = [
        (f"{ROOT}/vm/web1" if name.endswith("VM") else ROOT, name, member)
        for name, interface in read_contract().items()
        if not name.endswith("Job")
        for member in interface.methods
    ]
    properties = "org.freedesktop.DBus.Properties"
    calls += [(ROOT, properties, member) for member in ("Get", "GetAll", "Set")]
    introspectable = "org.freedesktop.DBus.Introspectable"
    nowhere = [(f"{ROOT}/vm/none", interface, member) for path, interface, member in calls if path.endswith("web1")]
    calls += [*nowhere, (f"{ROOT}/job/7", "org.cpragent1.Job", "Cancel"), (f"{ROOT}/vm/none", properties, "GetAll")]
    calls += [(f"{ROOT}/vm{end}", introspectable, "Introspect") for end in ("", "/web1", "/none")]
    calls.append((ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"))
    let_others_in(lab)
    ended = subprocess.run(
        [sys.executable, "-c", DENIED, lab.address],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answers = json.loads(ended.stdout)
    assert len(answers) == len(calls)
    assert {said.partition(":")[0] for said in answers.values()} == {"AccessDenied"}, answers
    for path, interface, member in nowhere:  # what is not there is refused in the words for what is
        assert answers[f"{path} {interface}.{member}"] == answers[f"{ROOT}/vm/web1 {interface}.{member}"]
    guest.assert_unbroken()


@pytest.mark.parametrize(
    ("path", "interface", "member", "error"),
    [
        (f"{ROOT}/vm/none", "org.cpragent1.VM", "Start", "org.freedesktop.DBus.Error.UnknownObject"),
        (ROOT, "org.cpragent1.Manager", "Explode", "org.freedesktop.DBus.Error.UnknownMethod"),
        (ROOT, "org.cpragent1.Explosion", "Explode", "org.freedesktop.DBus.Error.UnknownInterface"),
        (ROOT, "org.cpragent1.Manager", "Check", "InvalidArgument"),
    ],
)
def test_a_call_of_what_is_not_there(lab: Lab, path: str, interface: str, member: str, error: str) -> None:
    with pytest.raises(CallError) as caught:
        call(lab, path, interface, member)
    assert caught.value.kind == error


@pytest.mark.parametrize("member", ["Get", "GetAll", "Set"])
def test_properties_of_a_foreign_interface_are_an_error(lab: Lab, member: str) -> None:
    lab.guest()
    more: dict[str, tuple[str, list[object]]] = {
        "Get": ("s", ["State"]),
        "GetAll": ("", []),
        "Set": ("sv", ["State", Variant("s", "running")]),
    }
    signature, values = more[member]
    for foreign in ("org.cpragent1.Job", "org.example.Phantom", "org.freedesktop.DBus.Peer"):
        with pytest.raises(CallError) as caught:
            call(lab, f"{ROOT}/vm/web1", "org.freedesktop.DBus.Properties", member, f"s{signature}", foreign, *values)
        assert caught.value.kind == "org.freedesktop.DBus.Error.UnknownInterface"


def test_a_vm_is_shown_once_its_state_is_known(lab: Lab) -> None:
    """After a start of the agent no client hears of a running guest as stopped."""
    guest = lab.running()
    lab.end_agent()
    states: list[str] = []

    async def watch() -> None:
        async with Client.connected(lab.address) as client:
            seen = asyncio.Event()

            def on_message(message: Message) -> bool:
                if message.member == "InterfacesAdded" and "org.cpragent1.VM" in message.body[1]:
                    states.append(message.body[1]["org.cpragent1.VM"]["State"].value)
                    seen.set()
                return False

            client._bus.add_message_handler(on_message)
            bus = ("/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch")
            rule = ["type='signal',sender='org.cpragent1'"]
            await client._send(Message("org.freedesktop.DBus", *bus, signature="s", body=rule))
            started = asyncio.create_task(asyncio.to_thread(lab.start_agent))
            while not started.done():
                try:
                    found = await client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
                    states.extend(
                        one["org.cpragent1.VM"]["State"].value for one in found.values() if "org.cpragent1.VM" in one
                    )
                except CallError:
                    await asyncio.sleep(0)
            await started

    asyncio.run(watch())
    assert set(states) == {"running"}
    assert guest.properties["Since"] < time.time()
    guest.assert_unbroken()


def test_what_a_page_shows_of_a_vm(lab: Lab) -> None:
    guest = lab.guest("web1", "-smp", "2")
    shown = guest.properties
    assert (shown["Cpus"], shown["Autostart"], shown["LastPause"], shown["QemuRunning"]) == (2, False, 0.0, "")
    assert not shown["QemuOutdated"]
    guest.start()
    before = time.time()
    guest.save()
    assert before <= guest.properties["Since"] <= time.time()
    guest.load()
    # A timeline is written once the guest runs, and nobody waits for it.
    until(lambda: lab.client(lambda client: client.manager("ListHistory", "a{sv}", {})), "the load is in the history")
    (loaded,) = lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))
    until(lambda: guest.properties["LastPause"] > 0, "the pause is told")
    shown = guest.properties
    assert shown["LastPause"] == loaded["pause"] > 0
    assert shown["Since"] >= loaded["stopped-at"]
    assert (shown["DefinitionState"], shown["QemuOutdated"]) == ("ok", False)
    assert shown["QemuRunning"] == shown["QemuInstalled"]
    guest.definition["vm"]["autostart"] = True
    lab.define(guest)
    assert (guest.properties["DefinitionState"], guest.properties["Autostart"]) == ("changed", True)
    (lab.definitions / "web1.toml").write_text("[vm]\nqemv = 1\n")
    lab.client(lambda client: client.manager("Reload"))
    assert guest.properties["DefinitionState"] == "invalid"
    (lab.definitions / "web1.toml").unlink()
    lab.client(lambda client: client.manager("Reload"))
    assert guest.properties["DefinitionState"] == "gone"
    guest.assert_unbroken()


def test_history_and_reports_are_listed_in_parts(lab: Lab) -> None:
    for name in ("web1", "web2"):
        guest = lab.running(name)
        for _ in range(2):
            guest.save()
            guest.load()

    def history(**wanted: Variant) -> list[dict[str, object]]:
        return list(lab.client(lambda client: client.manager("ListHistory", "a{sv}", wanted)))

    def reports(limit: int, before: float = 0.0) -> list[dict[str, object]]:
        return list(lab.client(lambda client: client.manager("ListReports", "ud", limit, before)))

    everything = history()
    assert [one["vm"] for one in everything] == ["web1", "web1", "web2", "web2"]
    assert history(vm=Variant("s", "web1")) == everything[:2]
    assert history(vm=Variant("s", "web1"), limit=Variant("u", 1)) == everything[1:2]
    assert history(limit=Variant("u", 3)) == everything[1:]
    assert [one["id"] for one in reports(9)] == [one["id"] for one in reversed(everything)]
    first = reports(3)
    assert reports(3, float(str(first[-1]["started-at"]))) == reports(9)[3:]
    assert lab.job("SaveAll") != "done"  # RAM in /dev/shm outlives no kexec
    refused = reports(1)[0]
    assert (refused["kind"], refused["outcome"], refused["vms"]) == ("save-all", "refused", [])
    assert "does not survive a kexec" in str(refused["reason"])
    for limit in (0, 501):
        with pytest.raises(CallError, match="It must be 1 to 500"):
            reports(limit)
        with pytest.raises(CallError, match="It must be 1 to 500"):
            history(limit=Variant("u", limit))


def test_unknown_options_are_refused(lab: Lab) -> None:
    guest = lab.running()
    for options, said in (
        ({"force": Variant("b", True)}, "unknown option 'force'"),
        ({"survives": Variant("b", True)}, "has type 'b', it must be 's'"),
        ({"survives": Variant("s", "fire")}, "'fire' is not a valid Survives"),
    ):
        with pytest.raises(CallError, match=said) as caught:
            guest.call("CprSave", "ssa{sv}", "", "reboot", options)
        assert caught.value.kind == "InvalidArgument"
    guest.assert_unbroken()


def test_properties_are_read_only(lab: Lab) -> None:
    lab.guest()
    with pytest.raises(CallError, match="read-only"):
        call(
            lab,
            f"{ROOT}/vm/web1",
            "org.freedesktop.DBus.Properties",
            "Set",
            "ssv",
            "org.cpragent1.VM",
            "State",
            Variant("s", "running"),
        )


def test_changes_are_signalled(lab: Lab) -> None:
    """The states of a start, as one who watches sees them, and the object of a VM that is defined meanwhile."""
    guest = lab.guest()

    async def watch() -> list[tuple[str, object]]:
        seen: list[tuple[str, object]] = []
        running = asyncio.Event()
        async with Client.connected(lab.address) as client:

            def on_message(message: Message) -> bool:
                if message.member == "PropertiesChanged":
                    changed = {name: value.value for name, value in message.body[1].items()}
                    seen.extend([("State", changed["State"])] if "State" in changed else [])
                elif message.member in ("InterfacesAdded", "InterfacesRemoved", "JobNew", "JobRemoved"):
                    seen.append((str(message.member), message.body[0]))
                if ("State", "running") in seen and ("InterfacesAdded", f"{ROOT}/vm/web2") in seen:
                    running.set()
                return False

            client._bus.add_message_handler(on_message)
            bus = ("/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch")
            await client._send(
                Message("org.freedesktop.DBus", *bus, signature="s", body=["type='signal',sender='org.cpragent1'"])
            )
            await client.vm("web1", "Start")
            (lab.definitions / "web2.toml").write_text((lab.definitions / "web1.toml").read_text())
            await client.manager("Reload")
            async with asyncio.timeout(PATIENCE_S):
                await running.wait()
        return seen

    seen = asyncio.run(watch())
    assert ("State", "starting") in seen
    guest.assert_unbroken()


def second_agent(root: Path, address: str) -> str:
    ended = subprocess.run(
        [*DAEMON, f"--root={root}", f"--bus-address={address}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 1
    return ended.stderr


def test_a_second_agent_does_not_start(lab: Lab, tmp_path: Path) -> None:
    """Neither on the same bus nor, for the same guests, on another."""
    assert "another process owns org.cpragent1" in second_agent(tmp_path / "elsewhere", lab.address)
    other = tmp_path / "other"
    other.mkdir()
    with private_bus(other) as (address, _):
        assert f"another agent has {lab.state}" in second_agent(lab.root, address)


def test_busctl_alone_is_enough(lab: Lab) -> None:
    guest = lab.guest()

    def busctl(*arguments: str) -> str:
        return subprocess.run(
            ["busctl", f"--address={lab.address}", *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        ).stdout

    vm = ("org.cpragent1", f"{ROOT}/vm/web1", "org.cpragent1.VM")
    busctl("call", *vm, "Start")
    guest.until_counts()
    busctl("call", *vm, "CprSave", "ssa{sv}", "", "reboot", "0")
    assert busctl("get-property", *vm, "State") == 's "saved"\n'
    busctl("call", *vm, "CprLoad", "sa{sv}", "", "0")
    assert 's "web1"' not in busctl("call", "org.cpragent1", ROOT, "org.cpragent1.Manager", "ListDevices")
    assert '"web1" "running"' in busctl("call", "org.cpragent1", ROOT, "org.cpragent1.Manager", "ListVMs")
    assert f"{ROOT}/vm/web1" in busctl("tree", "--list", "org.cpragent1").split()
    assert "CprSave" in busctl("introspect", "org.cpragent1", f"{ROOT}/vm/web1")
    busctl("call", *vm, "Stop", "s", "acpi")
    guest_state = busctl("get-property", *vm, "State")
    assert guest_state == 's "stopped"\n'


def test_cprctl_does_all_of_it(lab: Lab) -> None:
    guest = lab.guest()
    for arguments, said in (
        (("list",), "stopped"),
        (("start", "web1"), "web1: started"),
        (("check",), "which a kexec erases"),
        (("save", "web1", "--survives", "qemu-restart"), "its RAM survives a qemu-restart"),
        (("status", "web1"), "stopped 20"),
        (("load", "web1"), "web1: loaded"),
        (("history",), "PAUSE"),
        (("save", "--all", "--survives", "qemu-restart"), "1 guest saved in"),
        (("load", "--all"), "1 guest loaded in"),
        (("status",), "1 VM,"),
        (("devices",), ""),
        (("reload",), ""),
    ):
        ended = lab.cprctl(*arguments)
        assert ended.returncode == 0, ended
        assert said in " ".join(ended.stdout.split()), ended
    guest.assert_unbroken()
    assert lab.cprctl("stop", "web1").stdout == "web1: stopped\n"


@pytest.mark.parametrize("command", ["list", "status", "status web1", "check", "check web1", "devices", "history"])
def test_cprctl_prints_json(lab: Lab, command: str) -> None:
    lab.guest()
    ended = lab.cprctl(*command.split(), "--json")
    assert ended.returncode == 0, ended
    json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("status", "none"), 3, "no VM named none"),
        (("load", "web1"), 3, "has no checkpoint"),
        (("save", "web1"), 1, "is stopped"),
        (("save",), 64, "name VMs, or give --all"),
        (("start", "private"), 0, ""),
        (("save", "private"), 4, "private"),
        (("check", "private"), 4, ""),
        (("--bus-address", "unix:path=/nonexistent/bus", "list"), 5, "cannot connect to D-Bus"),
    ],
)
def test_cprctl_exits_as_documented(lab: Lab, arguments: tuple[str, ...], code: int, said: str) -> None:
    lab.guest()
    private = lab.guest("private", "-object", "memory-backend-ram,id=extra,size=16M")
    if "private" in arguments and arguments[0] != "start":
        private.start()
    ended = lab.cprctl(*arguments)
    assert ended.returncode == code, ended
    assert said in ended.stderr
    assert said == "" or said not in ended.stdout
