# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract, the objects that fulfil it, the errors, the command lines and the dialects."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent import errors
from cpr_agent.bus.contract import escape, introspection, read_contract
from cpr_agent.bus.logs import LogObject
from cpr_agent.bus.objects import BusObject, JobObject, ManagerObject, VmObject
from cpr_agent.core.model import Definition, Located, MemorySection, VmSection
from cpr_agent.vm.cmdline import SANDBOX, cpus, emptied_logs, listening_sockets, plan_load, plan_start
from cpr_agent.vm.dialects import choose
from cpr_agent.vm.qemu import LiveQemu
from tests.samples import DEVDAX, launch, manifest
from tests.scripted_qmp import Answers, ScriptedQmp

OBJECTS: list[type[BusObject]] = [ManagerObject, VmObject, JobObject, LogObject]


@pytest.mark.parametrize("kind", OBJECTS)
def test_each_object_has_what_its_interface_says_and_no_more(kind: type[BusObject]) -> None:
    interface = read_contract()[kind.interface]
    members = dict(inspect.getmembers(kind, inspect.isfunction))
    assert {n.removeprefix("call_") for n in members if n.startswith("call_")} == set(interface.methods)
    assert {n.removeprefix("get_") for n in members if n.startswith("get_")} == set(interface.properties)
    assert {n.removeprefix("set_") for n in members if n.startswith("set_")} == interface.writable
    assert bool(interface.writable) == bool(interface.settable)


def test_every_method_names_its_polkit_action() -> None:
    actions = {method.action for interface in read_contract().values() for method in interface.methods.values()}
    assert actions == {f"org.cpragent1.{name}" for name in ("inspect", "manage-vms", "save", "load", "upgrade")}


def test_no_method_has_the_name_of_a_property() -> None:
    """Clients that make an attribute of each could not have both."""
    for interface in read_contract().values():
        assert not interface.methods.keys() & interface.properties.keys(), interface.name


def test_introspection_is_the_contract() -> None:
    contract = read_contract()
    shown = introspection(list(contract.values()), ["vm"])
    assert '<node name="vm"' in shown
    for interface in contract.values():
        assert all(f'name="{name}"' in shown for name in (*interface.methods, *interface.properties))


@pytest.mark.parametrize(
    ("label", "escaped"), [("web1", "web1"), ("web-1", "web_2d1"), ("1web", "_31web"), ("", "_"), ("a.b_c", "a_2eb_5fc")]
)
def test_names_are_escaped_as_systemd_does_it(label: str, escaped: str) -> None:
    """sd_bus_path_encode(3)."""
    assert escape(label) == escaped


def test_the_tree_of_errors_lists_every_class() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.CprError)]
    assert errors.__doc__
    listed = {line.split("─ ")[-1].split()[0] for line in errors.__doc__.splitlines() if "── " in line} | {"CprError"}
    assert {c.__name__ for c in classes} == listed
    assert len({c.kind for c in classes}) == len(classes)


def test_an_error_says_which_vm_what_is_left_and_what_to_do() -> None:
    error = errors.SaveFailed("could not be saved: disk full", vm="web1", left="the guest runs on", remedy="free some room")
    assert str(error) == "VM web1: could not be saved: disk full. The guest runs on. Free some room."


DEFINITION = Definition(
    name="web1",
    vm=VmSection(qemu="/usr/bin/qemu", arguments=("-machine", "q35,accel=kvm")),
    memory=MemorySection(size=64 << 20, device="uuid:x"),  # type: ignore[arg-type]  # an int does
)


def test_a_start_has_the_memory_by_descriptor_and_three_sockets() -> None:
    launch = plan_start(DEFINITION, [Located(identity=DEVDAX, node="/dev/dax3.0")], Path("/run/x"), Path("/log"))
    argv = " ".join(launch.argv)
    assert launch.argv[0] == "/usr/bin/qemu"
    assert "memory-backend-file,id=cpr-ram,size=67108864,mem-path=/proc/self/fd/10,share=on,align=2097152" in launch.argv
    assert "/dev/dax3.0" not in argv
    assert argv.count("mode=control") == 3
    assert sorted(launch.sockets.values()) == [11, 12, 13]
    assert "-incoming" not in launch.argv
    assert "-display none" in argv


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((), ("-sandbox", SANDBOX)),
        (("-sandbox", "on,spawn=allow"), ("-sandbox", "on,spawn=allow")),
        (("--sandbox", "on"), ("--sandbox", "on")),
        (("-sandbox", "off"), ()),
    ],
)
def test_qemu_is_sandboxed_unless_the_admin_says_something_of_it(own: tuple[str, ...], expected: tuple[str, ...]) -> None:
    vm = replace(DEFINITION.vm, arguments=("-nodefaults", *own, "-machine", "q35"))
    located = [Located(identity=DEVDAX, node="/dev/dax3.0")]
    argv = plan_start(replace(DEFINITION, vm=vm), located, Path("/run/x"), Path("/log")).argv
    at = [index for index, word in enumerate(argv) if word.endswith("-sandbox")]
    assert [argv[index : index + 2] for index in at] == ([expected] if expected else [])
    assert "-nodefaults" in argv
    assert "q35" in argv


def test_a_load_has_the_recorded_arguments_the_pinned_machine_and_waits() -> None:
    saved = manifest()
    launch = plan_load(saved, [Located(identity=DEVDAX, node="/dev/dax9.0")], Path("/log"))
    recorded = saved.launch.base_argv
    assert launch.argv == (*recorded, "-machine", "type=pc-q35-10.0", "-S", "-incoming", "defer")
    assert launch.base_argv == recorded
    assert launch.nodes == ("/dev/dax9.0",)
    assert launch.checkpoint == saved.id


@pytest.mark.parametrize(
    ("chardev", "loaded"),
    [
        ("file,id=c,path=/log", "file,id=c,path=/log,append=on"),
        ("backend=file,id=c,path=/a,,b", "backend=file,id=c,path=/a,,b,append=on"),
        ("id=c,path=/log,backend=file", "id=c,path=/log,backend=file,append=on"),
        ("file,id=c,path=/log,append=off", None),
        ("file,id=c,path=/log,append", None),
        ("file,id=c,path=/log,noappend", None),
        ("null,id=file,logfile=/log", "null,id=file,logfile=/log,logappend=on"),
        ("null,id=c,logfile=/log,logappend=off", None),
        ("file,id=c,path=/log,logfile=/b,append=on", "file,id=c,path=/log,logfile=/b,append=on,logappend=on"),
        ("socket,id=c,path=/file,server=on", None),
    ],
)
@pytest.mark.parametrize("name", ["-chardev", "--chardev"])
def test_a_load_goes_on_with_the_logs_of_its_guest(name: str, chardev: str, loaded: str | None) -> None:
    recorded = ("qemu", name, chardev, "-serial", "chardev:c")
    saved = manifest(launch=launch(base_argv=recorded, argv=recorded))
    found = plan_load(saved, [Located(identity=DEVDAX, node="/dev/dax9.0")], Path("/log"))
    assert found.argv[:5] == ("qemu", name, loaded or chardev, "-serial", "chardev:c")
    assert found.base_argv == recorded


def test_the_ports_whose_logs_a_load_empties() -> None:
    argv = ("qemu", "-serial", "file:/a", "--serial", "mon:file:/b", "-parallel", "null", "-chardev", "file,id=c,path=/c")
    assert emptied_logs(argv) == ["-serial file:/a", "-serial mon:file:/b"]


def test_the_sockets_of_a_command_line_are_those_at_which_qemu_listens() -> None:
    argv = (
        *(
            "qemu",
            "-chardev",
            "socket,id=qga,path=/run/qga,server=on,wait=off",
            "-chardev",
            "socket,path=/run/b,server,id=b",
        ),
        *("-chardev", "socket,id=client,path=/run/c", "-chardev", "socket,id=off,path=/run/d,server=off"),
        *("-chardev", "socket,id=cpr-agent,fd=11,server=on", "-chardev", "file,id=log,path=/var/log/x"),
        *("-chardev", "socket,id=relative,path=run/e,server=on", "-chardev", "socket,id=tcp,host=::1,port=1,server=on"),
        *(
            "-serial",
            "unix:/run/f,server=on",
            "-qmp",
            "unix:/run/g,,h,server",
            "-monitor",
            "unix:/run/i",
            "-serial",
            "stdio",
        ),
    )
    expected = {"qga": "/run/qga", "b": "/run/b", "/run/f": "/run/f", "/run/g,h": "/run/g,h"}
    assert listening_sockets(argv) == expected
    assert asyncio.run(LiveQemu(ScriptedQmp(lambda *_: []), launch(argv=argv)).listening()) == list(expected.values())


def test_the_socket_of_the_guest_agent_is_that_of_the_command_line() -> None:
    """QEMU says which character device has the port, and not where that leads."""
    argv = ("qemu", "-chardev", "socket,id=qga,path=/run/qga,server=on")
    said = {"name": "org.qemu.guest_agent.0", "chardev": "qga"}

    def answers(command: str, arguments: dict[str, object]) -> object:
        if command == "qom-list":
            return [{"name": "port0", "type": "child<virtserialport>"}]
        return said[str(arguments["property"])]

    def found(*argv: str) -> Path | None:
        return asyncio.run(LiveQemu(ScriptedQmp(answers), launch(argv=argv))._guest_agent())

    assert found(*argv) == Path("/run/qga")
    assert found("qemu", "-chardev", "socket,id=other,path=/run/x,server=on") is None
    said["chardev"] = "/run/systemd/private"
    assert found(*argv) is None


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        (("qemu", "-smp", "4"), 4),
        (("qemu", "--smp", "4,sockets=2,cores=2"), 4),
        (("qemu", "-smp", "cpus=3,maxcpus=8"), 3),
        (("qemu", "-smp", "sockets=2,cores=3,threads=2"), 12),
        (("qemu", "-smp", "2", "-smp", "8"), 8),
        (("qemu", "-m", "1G"), 1),
        ((), 0),
        (("qemu", "-smp", "cpus=many"), 0),
        (("qemu", "-smp", "{"), 0),
        (("qemu", "-smp", "99999999999"), 0),
        (("qemu", "-smp", "cpus=-1"), 0),
        (("qemu", "-smp", "sockets=99999,cores=99999"), 0),
    ],
)
def test_how_many_cpus_a_guest_has_is_read_from_its_command_line(argv: tuple[str, ...], count: int) -> None:
    assert cpus(argv) == count


def answers(*, commands: str = "migrate", capabilities: str = "x-ignore-shared", parameters: str = "") -> Answers:
    """What QEMU would say; the real ones are asked in tests/bus/test_dialects.py."""
    said = {
        "query-commands": [{"name": name} for name in commands.split()],
        "query-migrate-capabilities": [{"capability": name, "state": False} for name in capabilities.split()],
        "query-migrate-parameters": dict.fromkeys(parameters.split(), "normal"),
    }
    return lambda command, _: said[command]


def test_the_dialect_is_chosen_by_what_qemu_can_do() -> None:
    def chosen(**said: str) -> str:
        return asyncio.run(choose(ScriptedQmp(answers(**said)))).name

    assert chosen(parameters="mode") == "cpr-reboot"
    assert chosen() == "ignore-shared"
    assert chosen(commands="migrate cpr-save cpr-load") == "cpr-save"
    with pytest.raises(errors.QemuFailed, match="cannot leave RAM in place"):
        chosen(capabilities="xbzrle")
