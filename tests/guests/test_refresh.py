# SPDX-License-Identifier: GPL-2.0-or-later
"""A new QEMU for a running guest, without a reboot: real QEMUs, the old one beside the new one."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.bus.conftest import qemu_of
from tests.bus.test_crashes import dies
from tests.guests.scenarios import in_host_vm
from tests.guests.tally import case
from tests.lab import Guest, Lab, refused, script

NEW_DISK = ("-drive", "if=none,id=disk0,format=raw,file={}", "-device", "virtio-blk-pci,drive=disk0")


def installed(lab: Lab, version: str) -> None:
    """What the package manager does: another program under the path that the definition names."""
    path = lab.root / "qemu"
    path.unlink(missing_ok=True)
    path.symlink_to(qemu_of(version))


def refresh(guest: Guest, *options: str) -> str:
    done = guest.lab.cprctl("refresh", guest.name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def version(guest: Guest) -> str:
    told = guest.admin("query-version")["qemu"]
    return f"{told['major']}.{told['minor']}"


def reach_port(lab: Lab) -> None:
    """The guest's port has its name, and that alone."""
    with socket.socket(socket.AF_UNIX) as port:
        port.connect(str(lab.root / "port"))
    assert not list(lab.root.glob("port?*"))


@pytest.fixture
def guest(lab: Lab) -> Guest:
    """One that was started by QEMU 7.2, with a disk that is locked, and a socket with a path."""
    disk = lab.root / "disk"
    disk.write_bytes(bytes(1 << 20))
    more = [word.format(disk) for word in NEW_DISK]
    port = ("-chardev", f"socket,id=port,path={lab.root / 'port'},server=on,wait=off", "-device", "virtio-serial")
    guest = lab.guest("web1", *more, *port, "-device", "virtserialport,chardev=port", qemu=str(lab.root / "qemu"))
    installed(lab, "7.2")
    guest.start()
    guest.until_counts()
    return guest


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_guest_gets_the_qemu_that_is_installed_now(lab: Lab, guest: Guest, *, in_turn: bool) -> None:
    options = ["--in-turn"] if in_turn else []
    for expected in ("7.2", "10.0", "10.0"):
        installed(lab, expected)
        before = guest.pid
        with case(f"refresh to {expected}, {'in turn' if in_turn else 'beside'}"):
            assert "web1: has a new QEMU" in refresh(guest, *options)
            assert guest.pid != before
            assert not Path(f"/proc/{before}").exists() or b"qemu" not in Path(f"/proc/{before}/cmdline").read_bytes()
            assert version(guest) == expected
            assert guest.state == "running"
            guest.assert_unbroken()
        reach_port(lab)
    pauses = [told["pause"] for told in lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))]
    print(f"pauses: {', '.join(f'{pause:.3f} s' for pause in pauses)}")
    guest.save()
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n", "it is broken"),
        ("#!/bin/sh\nexec sleep 1000\n", "did not greet"),
        ("#!/bin/sh\nexec {qemu} -no-such-option\n", "no-such-option"),
        (None, "qemu"),
    ],
)
def test_a_new_one_that_does_not_work_leaves_the_old_one(lab: Lab, guest: Guest, program: str | None, why: str) -> None:
    lab.settings(files={"directories": [str(lab.exports)]}, agent={"qemu-start-timeout": "5s"})
    lab.end_agent()
    lab.start_agent()
    path, before = lab.root / "qemu", guest.pid
    path.unlink()
    if program:
        script(path, program.format(qemu=qemu_of("7.2")))
    with case(f"a new QEMU that does not work: {why}"):
        done = lab.cprctl("refresh", "web1")
        assert done.returncode == 1
        for words in ("VM web1: could not get a new QEMU", why, "Its guest goes on in the QEMU that it had"):
            assert words in done.stderr, done.stderr
        assert guest.pid == before
        assert version(guest) == "7.2"
        guest.assert_unbroken()
        reach_port(lab)
    installed(lab, "10.0")
    refresh(guest)
    guest.assert_unbroken()


@pytest.fixture
def own_program(lab: Lab) -> Guest:
    """A guest in turn with nobody: its QEMU 7.2 is a file that can be replaced, and finds its firmware from where it is."""
    (lab.root / "usr/bin").mkdir(parents=True)
    (lab.root / "usr/share").symlink_to("/usr/share")
    (lab.root / "usr/lib").symlink_to("/usr/lib")
    path = str(shutil.copy(qemu_of("7.2"), lab.root / "usr/bin/qemu"))
    guest = lab.guest("web1", "-device", "virtio-balloon", "-device", "virtio-net-pci,romfile=efi-virtio.rom", qemu=path)
    guest.start()
    guest.until_counts()
    return guest


BROKEN = [
    ("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n", "it is broken"),
    ("#!/bin/sh\nexec sleep 1000\n", "did not greet"),
    ('#!/bin/bash\nexec {qemu} "${{@/virtio-balloon/virtio-rng-pci}}"\n', "load of migration failed"),
    ("", "does not exist"),
]


def replaced(lab: Lab, program: str) -> None:
    """What the package manager does: the old program has no name any more."""
    path = lab.root / "usr/bin/qemu"
    path.unlink()
    if program:
        script(path, program.format(qemu=qemu_of("7.2")))


@pytest.mark.parametrize(("program", "why"), BROKEN)
def test_in_turn_a_new_one_that_does_not_work_brings_the_old_one_back(
    lab: Lab, own_program: Guest, program: str, why: str
) -> None:
    """Its file is replaced before the refresh, and the old one has ended when the new one fails."""
    lab.settings(files={"directories": [str(lab.exports)]}, agent={"qemu-start-timeout": "5s"})
    lab.end_agent()
    lab.start_agent()
    guest = own_program
    replaced(lab, program)
    with case(f"in turn, a new QEMU that does not work: {why}"):
        for _ in range(2):  # also when it runs in the one that was brought back
            before = guest.pid
            done = lab.cprctl("refresh", "--in-turn", "web1")
            print(done.stderr)
            assert done.returncode == 1
            for words in (
                "VM web1: could not get a new QEMU",
                why,
                "Its guest goes on in the QEMU that it had, on the same RAM",
                "Install a QEMU that works, then `cprctl refresh --in-turn web1`",
            ):
                assert words in done.stderr
            assert guest.pid != before
            assert guest.state == "running"
            guest.assert_unbroken()
    guest.save()
    guest.call("Resume")
    shutil.copy(qemu_of("7.2"), lab.root / "usr/bin/new")
    (lab.root / "usr/bin/new").rename(lab.root / "usr/bin/qemu")
    refresh(guest, "--in-turn")
    guest.assert_unbroken()
    assert not list((lab.root / "var/cache/cpr-agent/programs").iterdir())


@pytest.mark.parametrize(
    "point",
    [
        *("after refresh", "after saved", "after load-failed", "after load-begin 2"),
        *("before resume", "before consume", "after consume", "before resumed", "after resumed"),
    ],
)
def test_an_agent_that_is_killed_while_the_old_one_is_brought_back(lab: Lab, own_program: Guest, point: str) -> None:
    replaced(lab, BROKEN[0][0])
    with case(f"brought back, and the agent killed {point}"):
        dies(lab, own_program, point, "refresh in turn")
        own_program.until_state("running")
        own_program.assert_unbroken()


def test_in_turn_where_the_old_one_can_not_be_kept(lab: Lab) -> None:
    """A wrapper has started it; what that would do now nobody knows. The error says what that means."""
    installed(lab, "10.0")
    guest = lab.guest(qemu=str(lab.root / "qemu"))
    guest.start()
    guest.until_counts()
    (lab.root / "qemu").unlink()
    with case("in turn, an old QEMU that can't be kept"):
        done = lab.cprctl("refresh", "--in-turn", "web1")
        assert done.returncode == 1
        for words in ("stays saved: its old QEMU could not be kept (a wrapper", "the load can be repeated"):
            assert words in done.stderr, done.stderr
        assert guest.state == "saved"
        installed(lab, "10.0")
        guest.load()
        guest.assert_unbroken()


def test_an_older_one_is_refused(lab: Lab, guest: Guest) -> None:
    installed(lab, "10.0")
    refresh(guest)
    installed(lab, "7.2")
    with case("an older QEMU"):
        refused(guest, "LoadFailed", "version of QEMU was 10.0", "goes on in the QEMU that it had", member="Refresh")
        assert version(guest) == "10.0"
        guest.assert_unbroken()
        reach_port(lab)


SHARED = ("-machine", "aux-ram-share=on")


def test_one_qemu_hands_the_guest_to_the_other(lab: Lab) -> None:
    """By cpr-transfer, which 10.0 and newer have, and want all RAM shared for that."""
    installed(lab, "10.0")
    guest = lab.guest("web1", *SHARED, qemu=str(lab.root / "qemu"))
    guest.start()
    guest.until_counts()
    for expected in ("10.0", "10.0", "11.1", "11.1"):
        installed(lab, expected)
        before = guest.pid
        with case(f"handed over to {expected}"):
            assert guest.call("Refresh", "a{sv}", {}) == "transfer"
            assert guest.pid != before
            assert version(guest) == expected
            assert guest.state == "running"
            guest.assert_unbroken()
        assert guest.checkpoint_files() == []
    pauses = [told["pause"] for told in lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))]
    print(f"pauses: {', '.join(f'{pause * 1000:.1f} ms' for pause in pauses)}")
    guest.save()
    guest.load()
    guest.assert_unbroken()


@pytest.mark.parametrize("point", ["after transfer", "before resume", "after resume", "before resumed", "after resumed"])
def test_an_agent_that_is_killed_while_a_guest_is_handed_over(lab: Lab, point: str) -> None:
    """Before the new QEMU is the VM's own the guest goes on in the old one, after that in the new one; never in both."""
    installed(lab, "10.0")
    guest = lab.guest("web1", *SHARED, qemu=str(lab.root / "qemu"))
    guest.start()
    guest.until_counts()
    before = guest.pid
    with case(f"handed over, and the agent killed {point}"):
        dies(lab, guest, point, "refresh")
        guest.until_state("running")
        assert (guest.pid == before) == (point not in ("before resumed", "after resumed"))
        guest.assert_unbroken()
        assert guest.call("Refresh", "a{sv}", {}) == "transfer"
        guest.assert_unbroken()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n", "it is broken"),
        ("#!/bin/sh\nexec sleep 1000\n", "within 5 s"),
        ('#!/bin/sh\nexec {qemu} "$@" -device no-such-device\n', "no-such-device"),
        ('#!/bin/bash\nexec {qemu} "${{@/virtio-balloon/virtio-rng-pci}}"\n', "could not read the state"),
        ("older", 'unsupported machine type: "pc-q35-11.1"'),
    ],
)
def test_what_cannot_take_the_guest_leaves_it(lab: Lab, program: str, why: str) -> None:
    lab.settings(files={"directories": [str(lab.exports)]}, agent={"qemu-start-timeout": "5s"})
    lab.end_agent()
    lab.start_agent()
    installed(lab, "11.1")
    guest = lab.guest("web1", *SHARED, "-device", "virtio-balloon", qemu=str(lab.root / "qemu"))
    guest.start()
    guest.until_counts()
    before = guest.pid
    (lab.root / "qemu").unlink()
    if program == "older":
        installed(lab, "10.0")
    else:
        script(lab.root / "qemu", program.format(qemu=qemu_of("11.1")))
    with case(f"a new QEMU that can't take it: {why}"):
        refused(guest, "LoadFailed", "could not get a new QEMU", why, "goes on in the QEMU that it had", member="Refresh")
        assert guest.pid == before
        guest.assert_unbroken()
    installed(lab, "11.1")
    assert guest.call("Refresh", "a{sv}", {}) == "transfer"
    guest.assert_unbroken()


def test_what_both_cannot_have_at_once(lab: Lab) -> None:
    """A port of the host here; a tap device is the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    guest = lab.running(
        "web1", "-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22", "-device", "virtio-net,netdev=net0"
    )
    with case("a port of the host"):
        before = guest.pid
        refused(guest, "LoadFailed", "could not get a new QEMU", str(port), member="Refresh")
        assert guest.pid == before
        guest.assert_unbroken()
        refresh(guest, "--in-turn")
        guest.assert_unbroken()


def test_all(lab: Lab) -> None:
    guests = [lab.running(f"web{number}") for number in (1, 2, 3)]
    before = [guest.pid for guest in guests]
    with case("three guests, one after the other"):
        done = lab.cprctl("refresh", "--all")
        assert done.returncode == 0, done.stderr
        for guest, pid in zip(guests, before, strict=True):
            assert guest.pid not in before, pid
            guest.assert_unbroken()


def test_a_second_agent_finds_it_in_its_second_place(lab: Lab) -> None:
    guest = lab.running()
    refresh(guest)
    lab.end_agent()
    lab.start_agent()
    with case("an agent that starts after a refresh"):
        assert guest.state == "running"
        guest.save()
        guest.load()
        guest.assert_unbroken()


def test_under_systemd(tmp_path: Path) -> None:
    """In the host VM."""
    in_host_vm("refresh", tmp_path)
