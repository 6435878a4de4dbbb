# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs beside a QEMU: an emulated TPM, backends of vhost-user, NBD servers, taps. Each is real.

A guest goes on with its companion, or what can't be is refused before the guest is touched.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.bus.conftest import qemu_of
from tests.lab import PATIENCE_S, Guest, Lab, refused, script, until
from tests.reports.test_live import assert_goes_on, blocks, image

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")


@contextlib.contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_S)


@contextlib.contextmanager
def companion(path: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, once its socket is there."""
    with running(*command) as process:
        until(path.is_socket, f"{command[0]} listens")
        yield process


def warned(guest: Guest) -> list[str]:
    return [found["what"] for found in guest.call("Check") if found["code"] == "companion"]


def refuses_a_refresh(guest: Guest, *words: str) -> None:
    """Beforehand, and at once."""
    before = guest.pid
    refused(guest, "LoadFailed", *words, "Its guest goes on in the QEMU that it had", member="Refresh")
    assert guest.pid == before
    guest.assert_unbroken()


def goes_on_in_turn(guest: Guest) -> None:
    before = guest.pid
    ran = guest.lab.cprctl("refresh", "--in-turn", guest.name)
    assert ran.returncode == 0, ran
    guest.assert_unbroken()
    assert guest.pid != before


def test_a_server_that_qemu_can_start_without_is_not_waited_for(each_lab: Lab, each_qemu: str) -> None:
    retry = "reconnect=1" if each_qemu == qemu_of("7.2") else "reconnect-ms=1000"
    guest = each_lab.running("web1", "-chardev", f"socket,id=c0,path={each_lab.root}/events.sock,{retry}")
    assert_goes_on(guest)
    assert "not there yet" not in each_lab.log.read_text()


# -- a TPM ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swtpm(lab: Lab, *more: str, state: str = "tpm-state") -> Iterator[subprocess.Popen[bytes]]:
    path = lab.root / "tpm.sock"
    (lab.root / state).mkdir(exist_ok=True)
    words = (
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={lab.root / state}",
        "--ctrl",
        f"type=unixio,path={path}",
        *more,
    )
    with companion(path, *words) as process:
        yield process


@contextlib.contextmanager
def supervised(lab: Lab) -> Iterator[list[int]]:
    """It is started again whenever it ends, as a unit with Restart=always does it. The value has all PIDs."""
    pids: list[int] = []
    over = threading.Event()
    first = threading.Event()

    def supervise() -> None:
        while not over.is_set():
            with swtpm(lab) as process:
                pids.append(process.pid)
                first.set()
                while process.poll() is None and not over.is_set():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)

    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        assert first.wait(PATIENCE_S)
        yield pids
    finally:
        over.set()
        thread.join()


def with_tpm(lab: Lab) -> Guest:
    chardev = f"socket,id=ct,path={lab.root}/tpm.sock"
    return lab.running("web1", "-chardev", chardev, "-tpmdev", "emulator,id=t0,chardev=ct", "-device", "tpm-crb,tpmdev=t0")


@pytest.mark.parametrize("how", [[], ["--terminate"]])
def test_a_tpm_is_not_refreshed_and_goes_along_with_a_save(each_lab: Lab, how: list[str]) -> None:
    with swtpm(each_lab, *how) as first:
        guest = with_tpm(each_lab)
        assert [f"swtpm at {each_lab.root}/tpm.sock, which ends with its QEMU" in what for what in warned(guest)] == [True]
        refuses_a_refresh(guest, f"swtpm at {each_lab.root}/tpm.sock", "`cprctl save web1`")
        in_turn = each_lab.cprctl("refresh", "--in-turn", "web1")
        assert in_turn.returncode == 1
        assert "swtpm" in in_turn.stderr
        assert first.poll() is None, "its swtpm was ended"
        guest.save()
        guest.call("Resume")
        guest.assert_unbroken()
        guest.save()
        guest.call("Stop", "s", "hard")
        first.wait(PATIENCE_S)
    with swtpm(each_lab, *how):
        guest.load()
        guest.assert_unbroken()


def test_a_tpm_that_a_signal_has_ended_is_told_before_a_save(each_lab: Lab) -> None:
    with swtpm(each_lab) as process:
        guest = with_tpm(each_lab)
        assert blocks(guest) == []
        process.kill()
        process.wait(PATIENCE_S)
        gone = f"wtpm at {each_lab.root}/tpm.sock has ended, and its guest's TPM with it"
        until(lambda: gone in str(blocks(guest)), "check tells of it")
        refused(guest, "Blocked", gone, "start swtpm, and start the guest afresh", member="CprSave")
        guest.assert_unbroken()


def test_a_load_waits_for_a_tpm_that_is_started_again(each_lab: Lab) -> None:
    """The QEMU that saved the guest is there still, and takes its swtpm along."""
    with supervised(each_lab) as pids:
        guest = with_tpm(each_lab)
        for _ in range(2):
            guest.save()
            guest.load()
            guest.assert_unbroken()
        assert len(pids) >= 3


def saved_with_tpm(lab: Lab) -> Guest:
    """Its swtpm has ended with its QEMU."""
    with swtpm(lab) as first:
        guest = with_tpm(lab)
        guest.save()
        guest.call("Stop", "s", "hard")
        first.wait(PATIENCE_S)
    return guest


def test_the_state_of_a_tpm_is_the_guest_s_and_not_that_of_its_directory(each_lab: Lab) -> None:
    """An swtpm that had another TPM gets this one's from the load."""
    guest = saved_with_tpm(each_lab)
    with swtpm(each_lab, state="other"):
        guest.load()
        guest.assert_unbroken()
    mine, other = (each_lab.root / name / "tpm2-00.permall" for name in ("tpm-state", "other"))
    assert other.read_bytes() == mine.read_bytes()


def test_a_load_without_its_tpm_says_what_to_start_and_can_be_repeated(each_lab: Lab) -> None:
    guest = saved_with_tpm(each_lab)
    said = refused(guest, "LoadFailed", "the load can be repeated", f"Start swtpm at {each_lab.root}/tpm.sock first")
    assert "if another is installed now" not in said
    assert guest.state == "saved"
    with swtpm(each_lab):
        guest.load()
        guest.assert_unbroken()


# -- vhost-user -----------------------------------------------------------------------------------------------------------


def assert_not_saved(guest: Guest, device: str) -> None:
    """The backend has the guest's RAM mapped: once saved, the guest could be neither resumed nor loaded."""
    found = blocks(guest)
    assert {one["code"] for one in found} == {"blocked"}, found
    assert f"{device} shares the guest's RAM with a program" in found[0]["what"]
    for member in ("CprSave", "Refresh"):
        refused(guest, "Blocked", device, "start it afresh without", member=member)
    guest.assert_unbroken()


def test_a_shared_directory_is_told_before_a_save(each_lab: Lab) -> None:
    if not VIRTIOFSD.exists():
        pytest.skip(f"no {VIRTIOFSD}")
    shared, path = each_lab.root / "shared", each_lab.root / "fs.sock"
    shared.mkdir()
    options = f"source={shared},sandbox=chroot"
    with companion(path, VIRTIOFSD, f"--socket-path={path}", "-o", options) as backend:
        devices = ("-chardev", f"socket,id=fs,path={path}", "-device", "vhost-user-fs-pci,chardev=fs,tag=share")
        guest = each_lab.running("web1", *devices)
        assert [f"virtiofsd at {path}, which ends with its QEMU" in what for what in warned(guest)] == [True]
        assert_not_saved(guest, "-device vhost-user-fs-pci")
        assert backend.poll() is None


def test_a_disk_by_vhost_user_is_told_before_a_save(each_lab: Lab) -> None:
    path, disk = each_lab.root / "blk.sock", image(each_lab.root / "disk.raw", "raw")
    export = f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on"
    backend = ("qemu-storage-daemon", "--blockdev", f"file,node-name=d,filename={disk}", "--export", export)
    with companion(path, *backend) as process:
        devices = ("-chardev", f"socket,id=blk,path={path}", "-device", "vhost-user-blk-pci,chardev=blk")
        assert_not_saved(each_lab.running("web1", *devices), "-device vhost-user-blk-pci")
        assert process.poll() is None


# -- NBD, networks, character devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["uri", "keys", "blockdev"])
def test_a_disk_by_nbd_goes_on_in_turn(each_lab: Lab, form: str) -> None:
    """Its server has one client at a time, as qemu-nbd has by default: a second QEMU would wait for it, and hang."""
    path, disk = each_lab.root / "nbd.sock", image(each_lab.root / "disk.raw", "raw")
    drive = {
        "uri": ("-drive", f"file=nbd+unix:///?socket={path},format=raw,if=none,id=d0"),
        "keys": ("-drive", f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={path},if=none,id=d0"),
        "blockdev": ("-blockdev", f'{{"driver":"nbd","node-name":"d0","server":{{"type":"unix","path":"{path}"}}}}'),
    }[form]
    with companion(path, "qemu-nbd", "--persistent", "--format=raw", f"--socket={path}", disk) as process:
        guest = each_lab.running("web1", *drive, "-device", "ahci,id=a0", "-device", "ide-hd,drive=d0,bus=a0.0")
        assert [f"the NBD server at {path}" in what for what in warned(guest)] == [True]
        refuses_a_refresh(guest, f"two at once can't have the NBD server at {path}", "--in-turn")
        goes_on_in_turn(guest)
        assert_goes_on(guest)
        assert process.poll() is None


@contextlib.contextmanager
def listening(path: Path) -> Iterator[list[socket.socket]]:
    """The value has each connection that was made."""
    accepted: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield accepted
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()


def test_a_network_by_a_socket_goes_on_in_turn(each_lab: Lab) -> None:
    """As that of passt, which has one client at a time."""
    path = each_lab.root / "net.sock"
    with listening(path) as accepted:
        network = f"stream,id=n0,server=off,addr.type=unix,addr.path={path}"
        guest = each_lab.running("web1", "-netdev", network, "-device", "e1000,netdev=n0")
        refuses_a_refresh(guest, f"can't have the peer of the network n0 (passt or another) at {path}", "--in-turn")
        goes_on_in_turn(guest)
        until(lambda: len(accepted) == 2, "the new QEMU has the network")


def test_a_client_of_a_server_that_has_many_gets_a_new_qemu_beside(each_lab: Lab) -> None:
    path = each_lab.root / "log.sock"
    with listening(path) as accepted:
        chardev = f"socket,id=log,path={path}"
        guest = each_lab.running("web1", "-chardev", chardev, "-device", "isa-serial,chardev=log,index=1")
        assert [f"the server of the character device log at {path}" in what for what in warned(guest)] == [True]
        guest.call("Refresh", "a{sv}", {})
        guest.assert_unbroken()
        until(lambda: len(accepted) == 2, "the new QEMU is connected too")


# -- programs that QEMU would start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "program"),
    [
        ("tap,id=n0,ifname=cprtest0", "the script of its interface"),
        ("tap,id=n0,ifname=cprtest0,script=/etc/qemu-ifup,downscript=no", "the script of its interface"),
        ("tap,id=n0,helper=/usr/lib/qemu/qemu-bridge-helper", "the helper of its bridge"),
        ("bridge,id=n0,br=virbr0", "the helper of its bridge"),
        ("passt,id=n0", "passt"),
    ],
)
def test_a_network_that_needs_a_program_is_refused_before_it_starts(each_lab: Lab, network: str, program: str) -> None:
    guest = each_lab.guest("web1", "-netdev", network, "-device", "e1000,netdev=n0")
    with pytest.raises(CallError) as caught:
        guest.start()
    assert caught.value.kind == "InvalidDefinition"
    for word in (network, program, "sandbox", "script=no"):
        assert word in str(caught.value)
    assert guest.pid == 0


def test_a_script_that_the_sandbox_was_told_to_let_be_runs(each_lab: Lab) -> None:
    """A real tap, which is one QEMU's at a time."""
    ran = each_lab.root / "ran"
    up, down = (script(each_lab.root / name, f"#!/bin/sh\necho {name} $1 >>{ran}\n") for name in ("up", "down"))
    name = f"cprt{each_lab.root.stat().st_ino % 10**6}"
    network = f"tap,id=n0,ifname={name},script={up},downscript={down}"
    guest = each_lab.running("web1", "-sandbox", "on,spawn=allow", "-netdev", network, "-device", "e1000,netdev=n0")
    assert ran.read_text() == f"up {name}\n"
    refuses_a_refresh(guest, f"the tap device {name}", "--in-turn")
    goes_on_in_turn(guest)
    assert ran.read_text() == f"up {name}\ndown {name}\nup {name}\n"
