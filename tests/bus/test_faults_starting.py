# SPDX-License-Identifier: GPL-2.0-or-later
"""A start that can't be: each reason has its own clear error, and nothing runs or is created."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, refused, script, until


def test_a_missing_qemu_is_named(lab: Lab) -> None:
    guest = lab.guest(qemu="/usr/bin/qemu-of-nowhere")
    refused(guest, "QemuFailed", "/usr/bin/qemu-of-nowhere", "does not exist", member="Start")
    assert guest.state == "stopped"


def test_a_qemu_that_dies_at_start_is_quoted(lab: Lab) -> None:
    guest = lab.guest("web1", "-device", "no-such-device")
    refused(guest, "QemuFailed", "'no-such-device' is not a valid device", "Nothing runs", member="Start")
    assert guest.state == "stopped"


def test_a_program_that_ends_at_once_is_quoted(lab: Lab, tmp_path: Path) -> None:
    guest = lab.guest(qemu=script(tmp_path / "qemu", "#!/bin/sh\necho 'no licence for this host' >&2\nexit 1\n"))
    refused(guest, "QemuFailed", "no licence for this host", "Nothing runs", member="Start")
    assert guest.state == "stopped"


def test_a_memory_file_that_can_not_be_made(lab: Lab) -> None:
    refused(lab.guest(device="/proc/cpr-agent-test"), "MemoryUnusable", "/proc/cpr-agent-test", member="Start")


def test_a_user_that_does_not_exist(lab: Lab) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs a VM as another user")
    guest = lab.running()
    guest.call("Stop", "s", "hard")
    guest.definition["vm"]["user"] = "no-such-user"
    lab.define(guest)
    text = refused(guest, "MemoryUnusable", "no-such-user", "does not exist", member="Start")
    assert "internal error" not in text


def test_a_disk_that_is_full_is_named(lab: Lab) -> None:
    """No record, no start. There is a remedy, and the VM can be started once the admin has made room."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    guest = lab.guest()
    lab.end_agent()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", lab.state], check=True)
    filler = lab.state / "filler"
    try:
        lab.start_agent()
        (lab.state / "journal.reserve").unlink()
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 10))
        for _ in range(40):  # the journal's last page takes a few records more
            try:
                guest.start()
                guest.call("Stop", "s", "hard")
            except CallError:
                break
        until(lambda: guest.state == "stopped", "nothing runs")
        text = refused(guest, "HostFailed", "No space left on device", "journal", "Make room", member="Start")
        assert "internal error" not in text
        assert guest.state == "stopped"
        filler.unlink()
        guest.start()
    finally:
        lab.close()
        subprocess.run(["umount", "--lazy", lab.state], check=True)


def test_a_qmp_socket_that_answers_garbage(lab: Lab, tmp_path: Path) -> None:
    garbage = script(
        tmp_path / "garbage",
        "#!/usr/bin/python3\nimport socket\nlistener = socket.socket(fileno=11)\n"
        "while True:\n    peer, _ = listener.accept()\n    peer.sendall(b'HTTP/1.1 400 what?\\r\\n')\n    peer.recv(1)\n",
    )
    guest = lab.guest(qemu=garbage)
    refused(guest, "QemuFailed", "agent.sock", "Nothing runs", member="Start")
    assert guest.state == "stopped"


def test_a_qmp_socket_that_never_answers(lab: Lab, tmp_path: Path) -> None:
    lab.end_agent()
    lab.settings(agent={"qemu-start-timeout": "300ms"})
    lab.start_agent()
    guest = lab.guest(qemu=script(tmp_path / "mute", "#!/bin/sh\nexec sleep 1000\n"))
    refused(guest, "QemuFailed", "did not greet", member="Start")
    assert guest.state == "stopped"


def test_a_memory_file_of_a_missing_directory_is_not_created(lab: Lab) -> None:
    guest = lab.guest(device=str(lab.shm / "nowhere/ram"))
    refused(guest, "DeviceMissing", str(lab.shm / "nowhere"), member="Start")
    assert not guest.ram.exists()


def test_a_missing_dax_device_is_waited_for_and_named(lab: Lab) -> None:
    lab.end_agent()
    lab.settings(agent={"device-timeout": "200ms"})
    lab.start_agent()
    guest = lab.guest(device="uuid:00000000-1111-2222-3333-444444444444")
    refused(guest, "DeviceMissing", "00000000-1111-2222-3333-444444444444", "ndctl list", member="Start")


def test_a_memory_file_that_is_too_small(lab: Lab) -> None:
    guest = lab.guest()
    guest.ram.write_bytes(b"x" * 4096)
    guest.ram.chmod(0o600)
    refused(guest, "MemoryUnusable", "has 4096 bytes", member="Start")
    assert guest.ram.read_bytes() == b"x" * 4096


def test_a_memory_file_of_somebody_else_is_refused(lab: Lab) -> None:
    guest = lab.guest()
    guest.ram.touch()
    guest.ram.chmod(0o644)
    refused(guest, "MemoryUnusable", "others could read", member="Start")
    if os.geteuid() == 0:
        guest.ram.chmod(0o600)
        os.chown(guest.ram, 65534, 65534)
        refused(guest, "MemoryUnusable", "belongs to user 65534", member="Start")


def test_a_memory_that_is_a_directory_or_a_link(lab: Lab) -> None:
    guest = lab.guest()
    guest.ram.mkdir()
    refused(guest, "MemoryUnusable", "a directory", member="Start")
    guest.ram.rmdir()
    guest.ram.symlink_to("/dev/shm/elsewhere")
    refused(guest, "MemoryUnusable", "not a regular file", member="Start")


def test_two_vms_on_overlapping_memory(lab: Lab) -> None:
    first = lab.running("first", offset="0")
    second = lab.guest("second", device=str(first.ram), offset="8M")
    with first.ram.open("ab") as ram:
        ram.truncate(24 << 20)
    refused(second, "MemoryOverlap", "VM first", member="Start")
    findings = lab.client(lambda client: client.manager("Check", "a{sv}", {}))
    assert {f["vm"] for f in findings if f["code"] == "overlap"} == {"first", "second"}
    first.assert_unbroken()


def test_a_saved_guest_keeps_its_memory_from_others(lab: Lab, saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    thief = lab.guest("thief", device=str(saved.ram))
    refused(thief, "MemoryOverlap", "VM web1", member="Start")
    saved.load()
    saved.assert_unbroken()


def test_a_vm_that_runs_is_not_started_again(lab: Lab) -> None:
    guest = lab.running()
    refused(guest, "AlreadyRunning", member="Start")
    guest.assert_unbroken()


def test_a_saved_vm_is_not_started_afresh(saved: Guest) -> None:
    refused(saved, "AlreadySaved", "cprctl load web1", member="Start")
    saved.load()
    saved.assert_unbroken()


def test_the_launcher_does_nothing_without_a_ticket(saved: Guest) -> None:
    ended = subprocess.run(
        ["/usr/bin/python3", "-I", "agent/cpr_agent/vm/launch.py", str(saved.lab.run / "tickets/web1")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 78
    assert "there is no ticket" in ended.stderr
