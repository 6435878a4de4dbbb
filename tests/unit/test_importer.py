# SPDX-License-Identifier: GPL-2.0-or-later
"""Foreign command lines become definitions, and whatever can't be the same is said."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpr_agent.core.model import Definition, Imported
from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import OWN, option
from cpr_agent.vm.definition import read_definition
from cpr_agent.vm.foreign import MAX_DIRECTORY, MAX_OPTIONS, WITHOUT_VALUE, Value
from cpr_agent.vm.importer import MAX_CONFIGS, NO_DEVICE, Wanted, import_command_line

SAMPLES = Path(__file__).parent / "libvirt"
QEMU = "/usr/bin/qemu-system-x86_64"


def read(imported: Imported) -> Definition:
    """As the agent would read it: whatever is imported must pass for a definition."""
    return read_definition(Path(f"/etc/cpr-agent/vms/{imported.name}.toml"), imported.text.encode())


def why(imported: Imported, argument: str) -> str:
    """The outcome and the reason of the note on the argument that begins so."""
    found = [f"{note.outcome}: {note.why}" for note in imported.notes if note.argument.startswith(argument)]
    assert len(found) == 1, (argument, imported.notes)
    return found[0]


def imported(*arguments: str, name: str = "", device: str = "", offset: str = "", user: str = "") -> Imported:
    line = shlex.join([QEMU, *arguments])
    return import_command_line(line, Wanted(name, device, offset, user))


def test_what_can_be_the_same_is_the_same() -> None:
    arguments = ("-machine", "q35,accel=kvm", "-smp", "2", "-nodefaults", "-drive", "file=/srv/a b,,c.raw,if=virtio")
    found = imported("-name", "web1", "-m", "4G", *arguments, device="/dev/shm/web1", user="qemu")
    assert found.notes == ()
    definition = read(found)
    assert definition.name == "web1"
    assert definition.vm.qemu == QEMU
    assert definition.vm.arguments == arguments
    assert definition.vm.user == "qemu"
    assert (definition.memory.size, definition.memory.device, definition.memory.offset) == (4 << 30, "/dev/shm/web1", 0)


@pytest.mark.parametrize("name", sorted(set(OWN) - {"-m", "-name"}))
def test_what_the_agent_adds_itself_is_left_out(name: str) -> None:
    value = () if name[1:] in WITHOUT_VALUE else ("x",)
    found = imported("-nodefaults", name, *value, "-usb")
    assert why(found, name) == f"left out: {OWN[name]}"
    assert read(found).vm.arguments == ("-nodefaults", "-usb")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512 << 20), ("4G", 4 << 30), ("size=4194304k", 4 << 30), ("size=1024,slots=4,maxmem=8G", 1 << 30)],
)
def test_the_size_is_as_qemu_reads_it(text: str, size: int) -> None:
    found = imported("-m", text)
    assert read(found).memory.size == size
    if "slots" in text:
        assert "no memory hotplug" in why(found, "-m")


def test_without_a_size_it_is_qemus_default() -> None:
    found = imported("-nodefaults")
    assert read(found).memory.size == 128 << 20
    assert why(found, "-m").startswith("look")


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("memory-backend-file,id=ram,size=1G,share=on,mem-path=/dev/shm/web1", "/dev/shm/web1"),
        (
            '{"qom-type":"memory-backend-file","id":"ram","size":1073741824,"share":true,"mem-path":"/dev/dax0.0"}',
            "/dev/dax0.0",
        ),
        ("memory-backend-file,id=ram,size=1G,mem-path=/dev/shm/web1", NO_DEVICE),
        ("memory-backend-file,id=ram,size=1G,share=on,mem-path=/dev/hugepages/libvirt/qemu", NO_DEVICE),
        ("memory-backend-memfd,id=ram,size=1G,share=on", NO_DEVICE),
        ("memory-backend-ram,id=ram,size=1G", NO_DEVICE),
    ],
)
def test_ram_that_can_stay_where_it_is_does(backend: str, device: str) -> None:
    found = imported("-m", "1G", "-object", backend, "-machine", "q35,memory-backend=ram,usb=off")
    assert "[memory] says" in why(found, "-object")
    definition = read(found)
    assert definition.memory.device == device
    assert definition.vm.arguments == ("-machine", "q35,usb=off")
    if device == NO_DEVICE:
        assert "cprctl memory allocate imported --size 1G" in why(found, "memory.device")


def test_a_loader_that_writes_to_ram_at_a_load_is_left_out() -> None:
    found = imported("-device", "loader,addr=0x1000,data=1,data-len=4", "-device", "loader,file=/srv/x,addr=0x1000")
    assert "at every start" in why(found, "-device loader")
    assert read(found).vm.arguments == ("-device", "loader,file=/srv/x,addr=0x1000")


def test_several_backends_and_what_is_in_them_are_left_out() -> None:
    found = imported(
        *("-m", "2G", "-object", "memory-backend-ram,id=n0,size=1G", "-object", "memory-backend-ram,id=n1,size=1G"),
        *("-numa", "node,nodeid=0,memdev=n0", "-numa", "node,nodeid=1,memdev=n1"),
        *("-object", "memory-backend-ram,id=dimm,size=1G", "-device", "pc-dimm,id=d0,memdev=dimm", "-usb"),
    )
    assert read(found).vm.arguments == ("-usb",)
    assert [note.argument.split()[0] for note in found.notes if note.outcome == "left out"].count("-numa") == 2
    assert "would not outlive QEMU" in why(found, "-device pc-dimm")


@pytest.mark.parametrize(
    ("netdev", "now"),
    [
        ("tap,fd=28,id=net0,vhost=on,vhostfd=30", "tap,id=net0,ifname=web1-0,script=no,downscript=no,vhost=on"),
        ("tap,id=net0,fds=3:4,vhostfds=5:6", "tap,id=net0,ifname=web1-0,script=no,downscript=no,vhost=on"),
        ("tap,id=net0,fd=3", "tap,id=net0,ifname=web1-0,script=no,downscript=no"),
        (
            '{"type":"tap","fd":"28","vhost":true,"vhostfd":"30","id":"net0"}',
            '{"type":"tap","id":"net0","ifname":"web1-0","script":"no","downscript":"no","vhost":true}',
        ),
        ("user,id=net0", "user,id=net0"),
        ("tap,id=net0,ifname=tap3,script=no", "tap,id=net0,ifname=tap3,script=no"),
        ("tap,id=net0,ifname=tap3", "tap,id=net0,ifname=tap3,script=no,downscript=no"),
        ("tap,id=net0,script=/etc/up,ifname=tap3,vhost=on", "tap,id=net0,vhost=on,ifname=tap3,script=no,downscript=no"),
        ("bridge,id=net0,br=br0", "tap,id=net0,ifname=web1-0,script=no,downscript=no"),
        (
            '{"type":"bridge","id":"net0","br":"br0"}',
            '{"type":"tap","id":"net0","ifname":"web1-0","script":"no","downscript":"no"}',
        ),
        ("type=bridge,id=net0,br=br0", "type=tap,id=net0,ifname=web1-0,script=no,downscript=no"),
        ('{"type":"stream","id":"net0","addr":{"type":"unix","path":"/run/libvirt/qemu/passt/1"}}', "user,id=net0"),
        ("socket,id=net0,fd=3", "user,id=net0"),
        ("passt,id=net0,mac=02:00:00:00:00:01", "user,id=net0,mac=02:00:00:00:00:01"),
    ],
)
def test_a_descriptor_of_a_tap_becomes_its_name(netdev: str, now: str) -> None:
    found = imported("-name", "web1", "-netdev", netdev, "-device", "virtio-net-pci,netdev=net0")
    assert read(found).vm.arguments == ("-netdev", now, "-device", "virtio-net-pci,netdev=net0")
    assert (netdev == now) == (not any(note.argument.startswith("-netdev") for note in found.notes))


def test_the_name_of_an_interface_is_short_enough_for_the_kernel() -> None:
    taps = [word for number in range(3) for word in ("-netdev", f"tap,id=n{number},fd={number}")]
    found = imported("-name", "a-very-long-name-of-a-vm", *taps)
    names = [Value(text).keys["ifname"] for text in option(read(found).vm.arguments, "-netdev")]
    assert len(set(names)) == 3
    assert all(len(name) < 16 for name in names)


@pytest.mark.parametrize(
    ("chardev", "now"),
    [
        ("pty,id=c0", "pty,id=c0"),
        ("file,id=c0,path=/var/log/c0", "file,id=c0,path=/var/log/c0"),
        ("socket,id=c0,host=localhost,port=1,server=on", "socket,id=c0,host=localhost,port=1,server=on"),
        ("socket,id=c0,fd=21,server=on,wait=off", "socket,id=c0,path=/run/cpr-agent/vm/web1/c0.sock,server=on,wait=off"),
        (
            "socket,id=c0,path=/var/lib/libvirt/qemu/channel/target/domain-1-x/org.qemu.guest_agent.0,server=on,wait=off",
            "socket,id=c0,path=/run/cpr-agent/vm/web1/c0.sock,server=on,wait=off",
        ),
        (
            "socket,id=c0,path=/run/libvirt/x,server=on",
            "socket,id=c0,path=/run/cpr-agent/vm/web1/c0.sock,server=on,wait=off",
        ),
        ("socket,id=c0,path=/run/libvirt/x", "null,id=c0"),
        ("socket,id=c0,fd=21", "null,id=c0"),
        ("file,id=c0,path=/dev/fdset/3,append=on", "null,id=c0"),
        ("stdio,id=c0,mux=on", "null,id=c0,mux=on"),
        ("stdio,id=c0", "null,id=c0"),
    ],
)
def test_what_a_character_device_is_connected_to(chardev: str, now: str) -> None:
    found = imported("-name", "web1", "-chardev", chardev, "-serial", "chardev:c0")
    assert read(found).vm.arguments == ("-chardev", now, "-serial", "chardev:c0")
    assert (chardev == now) == (not any(note.argument.startswith("-chardev") for note in found.notes))


def test_monitors_go_with_their_sockets() -> None:
    found = imported(
        *("-qmp", "unix:/tmp/q,server", "-monitor", "stdio", "-chardev", "socket,id=m,path=/tmp/m,server=on", "-mon", "m"),
        *("-chardev", "socket,id=qga,path=/tmp/qga,server=on"),
    )
    assert read(found).vm.arguments == ("-chardev", "socket,id=qga,path=/tmp/qga,server=on")
    assert {note.argument.split()[0] for note in found.notes if note.outcome == "left out"} == {
        "-qmp",
        "-monitor",
        "-chardev",
        "-mon",
    }


TPM = ("-tpmdev", "emulator,id=tpm0,chardev=c0", "-device", "tpm-crb,tpmdev=tpm0")
VIRTIOFS = ("-device", "vhost-user-fs-pci,chardev=c0,tag=share")
SWITCH = ("-netdev", "vhost-user,id=net0,chardev=c0", "-device", "virtio-net-pci,netdev=net0")


@pytest.mark.parametrize("users", [TPM, VIRTIOFS, SWITCH])
@pytest.mark.parametrize(
    "chardev",
    [
        ("-chardev", "socket,id=c0,path=/run/libvirt/qemu/swtpm/1-web1-swtpm.sock"),
        ("-chardev", "socket,id=c0,path=/var/run/qemu-server/114.swtpm"),
        ("-chardev", '{"id":"c0","backend":{"type":"null"}}'),
        ("-chardev", "null,id=c0"),
        ("-chardev", "socket,id=c0,fd=12"),
        (),
    ],
)
def test_what_needs_a_companion_that_is_gone_is_left_out(users: tuple[str, ...], chardev: tuple[str, ...]) -> None:
    """QEMU would not start: it is the client, and nobody listens."""
    for words in ((*chardev, *users), (*users, *chardev)):
        found = imported("-usb", *words)
        assert read(found).vm.arguments == ("-usb",)
        names = [word for word in words if word.startswith("-")]
        assert [note.argument.split()[0] for note in found.notes if note.outcome == "left out"] == names


@pytest.mark.parametrize(
    ("name", "device", "kept"),
    [
        (
            "-device",
            '{"driver":"vhost-vsock-pci","id":"v","guest-cid":3,"vhostfd":"25"}',
            '{"driver":"vhost-vsock-pci","id":"v","guest-cid":3}',
        ),
        (
            "-device",
            "vhost-scsi-pci,wwpn=naa.5001405bc0ab1234,vhostfd=31,id=h",
            "vhost-scsi-pci,wwpn=naa.5001405bc0ab1234,id=h",
        ),
        ("-object", "iommufd,id=i,fd=7", "iommufd,id=i"),
    ],
)
def test_a_device_by_a_descriptor_is_opened_by_its_path(name: str, device: str, kept: str) -> None:
    """libvirt starts each <vsock> and each vhost-scsi so."""
    found = imported(name, device)
    assert "changed: its descriptor dies with who opened it" in why(found, f"{name} {device}")
    assert read(found).vm.arguments == (name, kept)


@pytest.mark.parametrize(("users", "who"), [(TPM, "swtpm"), (VIRTIOFS, "virtiofsd"), (SWITCH, "vhost-user port")])
def test_a_client_stays_a_client_and_is_told_who_must_listen(users: tuple[str, ...], who: str) -> None:
    chardev = ("-chardev", "socket,id=c0,path=/run/companions/web1.sock")
    found = imported(*chardev, *users)
    assert read(found).vm.arguments == (*chardev, *users)
    assert re.match(f"look: QEMU is the client at /run/companions/web1.sock: .*{who} must listen", why(found, "-chardev"))


@pytest.mark.parametrize("users", [VIRTIOFS, SWITCH])
def test_what_can_not_be_saved_is_told(users: tuple[str, ...]) -> None:
    found = imported("-chardev", "socket,id=c0,path=/run/companions/web1.sock", *users)
    assert why(found, users[0]).startswith("look: a guest with it can't be saved")


def test_a_server_for_a_companion_waits_for_it() -> None:
    chardev = ("-chardev", "socket,id=c0,path=/run/ovs/vhu0,server=on")
    assert "QEMU makes /run/ovs/vhu0, and waits there" in why(imported(*chardev, *SWITCH), "-chardev")


def test_secrets_that_die_are_left_out_and_who_needs_them_is_named() -> None:
    found = imported(
        *(
            "-object",
            '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-x/master-key.aes"}',
        ),
        *("-object", "secret,id=disk,data=abc,keyid=masterKey0,iv=def,format=base64"),
        *("-object", "secret,id=mine,file=/etc/keys/mine"),
        *("-blockdev", '{"driver":"luks","node-name":"d","key-secret":"disk","file":"f"}'),
    )
    assert "dies with libvirt" in why(found, '-object {"qom-type":"secret"')
    assert "needs one that does" in why(found, "-object secret,id=disk")
    assert why(found, "-blockdev").startswith("look: it needs a secret")
    assert read(found).vm.arguments[:2] == ("-object", "secret,id=mine,file=/etc/keys/mine")


def test_what_libvirt_would_start() -> None:
    """``virsh domxml-to-native qemu-argv`` of libvirt 9.0, with each option on a line of its own."""
    found = import_command_line((SAMPLES / "domxml-to-native").read_text(), Wanted(device="uuid:x"))
    definition = read(found)
    assert (definition.name, definition.memory.size) == ("web1", 4 << 30)
    outcomes = {(note.outcome, note.argument.partition(" ")[0]) for note in found.notes if note.argument.startswith("-")}
    assert outcomes == {
        *(("left out", name) for name in ("-S", "-object", "-chardev", "-mon", "-no-shutdown")),
        *(("changed", name) for name in ("-netdev", "-chardev")),
    }
    assert {note.argument.partition("=")[0] for note in found.notes if note.argument[0].isupper()} >= {"LC_ALL", "HOME"}
    assert_only_what_was_noted_is_gone((SAMPLES / "domxml-to-native").read_text(), found)


def test_what_libvirt_runs() -> None:
    """/proc/PID/cmdline of a domain of libvirt 9.0."""
    found = import_command_line((SAMPLES / "running").read_text(), Wanted(user="libvirt-qemu"))
    definition = read(found)
    assert (definition.name, definition.memory.size, definition.memory.device) == ("web1", 256 << 20, NO_DEVICE)
    assert definition.vm.user == "libvirt-qemu"
    assert_only_what_was_noted_is_gone((SAMPLES / "running").read_text(), found)


def assert_only_what_was_noted_is_gone(text: str, found: Imported) -> None:
    """Each word that is not in the definition as it was stands in a note, or is what [memory] and the name say."""
    arguments = read(found).vm.arguments
    noted = " ".join(note.argument for note in found.notes)
    for word in shlex.split(text.replace("\\\n", " ")):
        said = word.endswith(QEMU) or word in ("-name", "-m", "256", "4096") or word.startswith("guest=")
        machine = word.endswith(",memory-backend=pc.ram") and word.rpartition(",")[0] in arguments
        assert word in arguments or word in noted or said or machine, word


def test_an_option_without_a_value_takes_none() -> None:
    found = imported("-tdf", "-rtc-td-hack", "-no-kvm-pit", "-no-kvm-pit-reinjection", "-usb")
    assert read(found).vm.arguments[-1:] == ("-usb",)


def test_a_program_called_kvm_that_was_told_not_to_take_it_does_not() -> None:
    assert read(import_command_line("/usr/bin/kvm -no-kvm")).vm.arguments == ("-machine", "accel=tcg")
    assert read(import_command_line("/usr/bin/kvm -no-kvm -accel tcg")).vm.arguments == ("-accel", "tcg")


def test_no_terminal() -> None:
    found = imported("-nographic", "-serial", "mon:stdio")
    assert read(found).vm.arguments == ("-display", "none", "-serial", "null")


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        (("-no-hpet",), ("-machine", "hpet=off")),
        (("-no-acpi",), ("-machine", "acpi=off")),
        (("-watchdog", "i6300esb"), ("-device", "i6300esb")),
        (("-realtime", "mlock=off"), ("-overcommit", "mem-lock=off")),
        (("-balloon", "virtio,addr=5"), ("-device", "virtio-balloon,addr=5")),
        (("-balloon", "none"), ()),
        (("-tb-size", "16"), ()),
        (("-tdf",), ()),
        (("-alt-grab",), ()),
        (("-no-kvm",), ("-machine", "accel=tcg")),
        (("-no-kvm-pit-reinjection",), ("-global", "kvm-pit.lost_tick_policy=discard")),
        (("-rtc-td-hack",), ("-rtc", "driftfix=slew")),
        (("-device", "sga"), ("-machine", "graphics=off")),
        (("-device", "virtio-blk-pci,id=d,scsi=off"), ("-device", "virtio-blk-pci,id=d")),
        (("-device", '{"driver":"virtio-blk-pci","scsi":false}'), ("-device", '{"driver":"virtio-blk-pci"}')),
        (("-chardev", "tty,id=c,path=/dev/ttyS0"), ("-chardev", "serial,id=c,path=/dev/ttyS0")),
        (("-chardev", "backend=parport,id=c,path=/dev/lp0"), ("-chardev", "backend=parallel,id=c,path=/dev/lp0")),
        (("-display", "gtk,gl=on"), ("-display", "none")),
        (("-sdl",), ("-display", "none")),
        (("-audiodev", "pa,id=snd0,server=/run/user/1000/pulse"), ("-audiodev", "none,id=snd0")),
        (("-audiodev", '{"driver":"pipewire","id":"snd0"}'), ("-audiodev", "none,id=snd0")),
        (("-action", "panic=pause,shutdown=pause"), ("-action", "panic=pause")),
        (("-action", "shutdown=pause"), ()),
        (("-run-with", "chroot=/x,async-teardown=on"), ("-run-with", "async-teardown=on")),
        (("-run-with", "user=me"), ()),
        (("-machine", "type=pc-q35-9.0+pve1,usb=off"), ("-machine", "type=pc-q35-9.0,usb=off")),
        (
            ("-vnc", "unix:/var/run/qemu-server/1.vnc,password=on"),
            ("-vnc", "unix:/run/cpr-agent/vm/web1/vnc.sock,password=on"),
        ),
        (("-M", "q35,accel=kvm", "-accel", "tcg"), ("-M", "q35", "-accel", "tcg")),
        (("-preconfig",), ()),
        (("-id", "114"), ()),
        (("-loadstate", "/x"), ()),
        (("-global", "migration.send-section-footer=off"), ()),
        (("-global", "PIIX4_PM.disable_s3=1"), ("-global", "PIIX4_PM.disable_s3=1")),
        (("-vnc", ":1"), ("-vnc", ":1")),
        (("-run-with", "async-teardown=on"), ("-run-with", "async-teardown=on")),
        (("-action", "panic=pause"), ("-action", "panic=pause")),
    ],
)
def test_what_would_not_start_or_not_end_becomes_what_does(arguments: tuple[str, ...], now: tuple[str, ...]) -> None:
    found = imported("-name", "web1", *arguments)
    assert read(found).vm.arguments == now
    said = [note for note in found.notes if note.argument.startswith(arguments[0])]
    assert [note.outcome for note in said] == ([] if now == arguments else ["changed" if now else "left out"])


def test_a_qemu_that_is_called_kvm_takes_it() -> None:
    found = import_command_line("/usr/bin/kvm -usb")
    assert read(found).vm.arguments == ("-usb", "-accel", "kvm")
    for accelerated in ("-enable-kvm", "-accel tcg", "-machine q35,accel=tcg"):
        assert read(import_command_line(f"/usr/bin/kvm {accelerated}")).vm.arguments == tuple(accelerated.split())


def test_only_one_way_to_name_the_accelerator_is_kept() -> None:
    """QEMU refuses -accel beside the others."""
    found = imported("-enable-kvm", "-accel", "tcg")
    assert read(found).vm.arguments == ("-accel", "tcg")
    assert why(found, "-enable-kvm").startswith("left out")
    assert read(imported("-enable-kvm", "-M", "q35")).vm.arguments == ("-enable-kvm", "-M", "q35")


def test_a_disk_whose_writes_are_lost_gets_a_look() -> None:
    assert why(imported("-drive", "file=/a,snapshot=on"), "-drive").startswith("look: what the guest writes")


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        (("-drive", "file=web 1,,a.raw,if=virtio"), ("-drive", "file=/srv/vm/web 1,,a.raw,if=virtio")),
        (("-drive", "if=virtio,file=../a.raw"), ("-drive", "if=virtio,file=/srv/a.raw")),
        (("-blockdev", "driver=file,filename=a.raw"), ("-blockdev", "driver=file,filename=/srv/vm/a.raw")),
        (
            ("-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"a.raw"},"node-name":"d"}'),
            ("-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"/srv/vm/a.raw"},"node-name":"d"}'),
        ),
        (("-cdrom", "a.iso"), ("-cdrom", "/srv/vm/a.iso")),
        (("-kernel", "./vmlinuz"), ("-kernel", "/srv/vm/vmlinuz")),
        (("-chardev", "file,id=c,path=log"), ("-chardev", "file,id=c,path=/srv/vm/log")),
        (("-fw_cfg", "name=opt/x,file=x"), ("-fw_cfg", "name=opt/x,file=/srv/vm/x")),
        (("a.raw",), ("-drive", "file=/srv/vm/a.raw,index=0,media=disk")),
    ],
)
def test_a_relative_path_is_resolved_or_said(arguments: tuple[str, ...], whole: tuple[str, ...]) -> None:
    option_name = whole[0]
    found = import_command_line(f"cd /srv/vm && {shlex.join([QEMU, *arguments])}")
    assert read(found).vm.arguments == whole
    assert "was relative to /srv/vm" in why(found, option_name)
    found = imported(*arguments)
    assert why(found, option_name).startswith("look: the path")
    assert "is relative to where that QEMU was started" in why(found, option_name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-drive", "file=/a.raw"),
        ("-drive", "file=nbd:localhost:10809"),
        ("-drive", "file=rbd:pool/a:id=admin"),
        ("-blockdev", "driver=raw,file=lower"),
        ("-blockdev", '{"driver":"raw","file":"lower"}'),
        ("-bios", "bios-256k.bin"),
        ("-device", "virtio-net-pci,romfile=pxe.rom"),
    ],
)
def test_what_is_no_relative_path_stays(arguments: tuple[str, ...]) -> None:
    for text in (shlex.join([QEMU, *arguments]), f"cd /srv/vm && {shlex.join([QEMU, *arguments])}"):
        found = import_command_line(text)
        assert read(found).vm.arguments == arguments
        assert arguments[0] not in {note.argument.split()[0] for note in found.notes}


# -- how it was started -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "user", "said"),
    [
        ("", "", "look: QEMU will run as a user of its own"),
        ("sudo ", "", "changed: that QEMU ran as root, and here it runs as a user of its own"),
        ("A=b exec sudo -E -n ", "", "changed: that QEMU ran as root"),
        ("sudo -u libvirt-qemu ", "libvirt-qemu", ""),
        ("cd /srv && sudo --user libvirt-qemu ", "libvirt-qemu", ""),
    ],
)
def test_who_it_ran_as_is_taken_or_said(prefix: str, user: str, said: str) -> None:
    found = import_command_line(f"{prefix}{QEMU} -usb")
    assert read(found).vm.user == user
    assert why(found, "vm.user").startswith(said) if said else "vm.user" not in {note.argument for note in found.notes}
    assert read(import_command_line(f"{prefix}{QEMU} -usb", Wanted(user="me"))).vm.user == "me"


def test_a_line_as_ps_shows_it_has_no_quotes() -> None:
    shown = f"""{QEMU} -name guest=web 1 -object {{"qom-type":"iothread","id":"io 1"}} -append a b=c -usb"""
    found = import_command_line(shown)
    assert found.name == "web-1"
    assert read(found).vm.arguments == ("-object", '{"qom-type":"iothread","id":"io 1"}', "-append", "a b=c", "-usb")
    assert why(found, QEMU).startswith("look: the line has no quotes")


CONFIGURATION = """\
# as Proxmox VE has it
[device "ehci"]
  driver = "ich9-usb-ehci1"
  bus = "pcie.0"
  addr = "1d.7"

[device "pci.0"]
  driver = "pci-bridge"
  chassis_nr = "1"
[machine]
  usb = "off"
"""


def configured(tmp_path: Path, content: str | bytes) -> Imported:
    (tmp_path / "qemu-server").mkdir(exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "qemu-server/pve.cfg").write_bytes(content)
    words = ["-M", "q35", "-readconfig", "/usr/share/qemu-server/pve.cfg", "-device", "usb-tablet,bus=ehci.0"]
    return import_command_line(shlex.join([QEMU, *words]), shared=tmp_path)


def test_a_configuration_that_a_package_brought_is_unfolded(tmp_path: Path) -> None:
    found = configured(tmp_path, CONFIGURATION)
    assert read(found).vm.arguments[2:] == (
        *("-device", "driver=ich9-usb-ehci1,id=ehci,bus=pcie.0,addr=1d.7"),
        *("-device", "driver=pci-bridge,id=pci.0,chassis_nr=1", "-machine", "usb=off"),
        *("-device", "usb-tablet,bus=ehci.0"),
    )
    assert why(found, "-readconfig") == "changed: the 3 options in it stand here by themselves"
    assert not any(note.argument.startswith("-device") for note in found.notes)


@pytest.mark.parametrize("content", [b"\xff", "words", '[device "x"]\nnot a pair\n', "# " * 40_000])
def test_one_that_can_not_be_read_is_left_out_and_its_devices_are_named(tmp_path: Path, content: str | bytes) -> None:
    found = configured(tmp_path, content)
    assert why(found, "-readconfig").startswith("left out")
    assert why(found, "-device usb-tablet") == ("look: its bus ehci.0 was made by the file that was left out (-readconfig)")


@pytest.mark.parametrize("path", ["/etc/shadow", "/usr/share/../../etc/shadow", "/usr/share/out", "/usr/share", "pve.cfg"])
def test_only_what_everybody_may_read_is_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "secret").write_text(CONFIGURATION)
    (tmp_path / "shared/out").symlink_to(tmp_path / "secret")
    found = import_command_line(shlex.join([QEMU, "-readconfig", path]), shared=tmp_path / "shared")
    assert why(found, "-readconfig").startswith("left out")


def test_a_word_without_a_dash_is_a_disk() -> None:
    found = imported("-m", "1G", "/srv/disk,1.img")
    assert read(found).vm.arguments == ("-drive", "file=/srv/disk,,1.img,index=0,media=disk")


def test_a_name_that_no_vm_can_have_is_changed() -> None:
    assert imported("-name", "guest=my vm/1").name == "my-vm-1"
    assert imported("-nodefaults").name == "imported"
    assert imported("-name", "a", name="b").name == "b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with ''"),
        ("ls -l", "begins with 'ls'"),
        ('qemu-system-x86_64 -name "web1', "No closing quotation"),
        ("qemu-system-x86_64 -m lots", "-m lots"),
        ("""qemu-system-x86_64 -object '{"qom-type":'""", "-object"),
        ("""qemu-system-x86_64 -object '[1]' -device '{"a":[1,{"b":2}]}'""", ""),
    ],
)
def test_what_is_no_command_line_is_refused(text: str, said: str) -> None:
    if said:
        with pytest.raises(InvalidArgument) as caught:
            import_command_line(text)
        assert said in caught.value.text
    else:
        read(import_command_line(text))


def test_a_shells_ways_are_taken() -> None:
    found = import_command_line("LC_ALL=C \\\n PATH=/bin exec qemu-system-x86_64 \\\r\n -usb \\\n-append 'a b' &\n")
    assert read(found).vm.arguments == ("-usb", "-append", "a b")
    assert {note.argument for note in found.notes} >= {"LC_ALL=C", "PATH=/bin"}


@example(["\x1f"])
@example(["\r"])
@example(["\U00018cd6"])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=8))
def test_any_words_are_taken_or_refused(words: list[str]) -> None:
    try:
        found = import_command_line(shlex.join([QEMU, *words]))
    except InvalidArgument:
        return
    read_definition(Path(f"/x/{found.name}.toml"), found.text.encode()) if "cpr-" not in found.text[40:] else None


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True), st.text(max_size=9), min_size=1))
def test_keys_are_taken_out_and_the_rest_stays(keys: dict[str, str]) -> None:
    keys = {f"x-{key}": value.replace("\0", "") for key, value in keys.items()}
    gone = next(iter(keys))
    rest = {key: value for key, value in keys.items() if key != gone}
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in {"id": "x", **keys}.items())
    assert (
        Value(str(Value(text).without(gone))).keys
        == Value(",".join(["id=x", *[f"{k}={v.replace(',', ',,')}" for k, v in rest.items()]])).keys
    )
    assert json.loads(str(Value(json.dumps({"id": "x", **keys})).without(gone))) == {"id": "x", **rest}


def test_options_without_an_argument_are_qemus() -> None:
    """As far as the one of this machine tells: its help has them without anything behind."""
    said = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in said.splitlines() if line.startswith("-")]
    for name in WITHOUT_VALUE:
        for words in lines:
            assert words[0] != f"-{name}" or "=" not in "".join(words[1:2]), words


def calls_of(line: str) -> int:
    """How many functions an import calls: what it costs, on a slow day too."""
    found = 0

    def count(frame: FrameType, event: str, argument: object) -> None:  # noqa: ARG001 - Python's signature
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        import_command_line(line)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    "option",
    [
        "-drive file=/x{n}",
        "-netdev tap,fd=1",
        "-a",
        "-object {{}}",
        "-device a,drive=b{n}",
        "-object rng-random,id=a{n},rng=a{m}",
        "-object rng-random,id=a{m},rng=a{n}",
        "-object memory-backend-ram,id=a{n}",
        "-object secret,id=s{n},file=/run/libvirt/x -x a",
        "-set device.a{n}.b=c",
        "-chardev socket,id=c{n},fd={n}",
    ],
)
def test_each_option_costs_the_same_however_many_there_are(option: str) -> None:
    few, many = (
        calls_of(" ".join(["qemu", *(option.format(n=n, m=n + 1) for n in range(count))])) / count for count in (100, 500)
    )
    assert many < 1.5 * few


def test_a_long_word_costs_no_more_than_its_characters() -> None:
    def took_s(length: int) -> float:
        """Of the processor; whoever else has it meanwhile does not count."""
        began = time.thread_time()
        with pytest.raises(InvalidArgument, match="not a command line of QEMU"):
            import_command_line("kvm" * length + "/")
        return time.thread_time() - began

    short, long = (min(took_s(length) for _ in range(5)) for length in (8_000, 64_000))
    assert long < 40 * short  # eight times as long; by its square it were 64 times


def test_what_is_said_of_a_long_line_is_not_much_longer() -> None:
    paths = ",".join(f"file=a{n}" for n in range(900))
    found = imported("-drive", paths)
    assert why(found, "-drive").startswith("look: the path a899 is relative")
    assert len(found.text) < 4 * len(paths)
    with pytest.raises(InvalidArgument, match=f"more than {MAX_DIRECTORY} characters"):
        import_command_line(f"cd /{'d' * MAX_DIRECTORY} && {QEMU} -drive file=a")


def test_more_options_than_a_guest_has_are_refused(tmp_path: Path) -> None:
    imported(*["-usb"] * MAX_OPTIONS)
    with pytest.raises(InvalidArgument, match=f"more than {MAX_OPTIONS} options.*Leave some out"):
        imported(*["-usb"] * (MAX_OPTIONS + 1))
    (tmp_path / "some.cfg").write_text("[usb]\n" * 100)
    line = f"{QEMU} {'-readconfig /usr/share/some.cfg ' * MAX_CONFIGS}"
    with pytest.raises(InvalidArgument, match=f"more than {MAX_OPTIONS} options"):
        import_command_line(line, shared=tmp_path)


def test_of_many_configurations_the_last_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "some.cfg").write_text("[usb]\n")
    found = import_command_line(f"{QEMU} {'-readconfig /usr/share/some.cfg ' * (MAX_CONFIGS + 3)}", shared=tmp_path)
    outcomes = [note.outcome for note in found.notes if "some.cfg" in note.argument]
    assert outcomes == ["changed"] * MAX_CONFIGS + ["left out"] * 3
