"""Bad input and faults: each has its own clear error, and leaves guest and files as they were."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.lab import Guest, Lab, until


@pytest.fixture
def saved(lab: Lab) -> Guest:
    guest = lab.running()
    guest.save()
    return guest


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def refused(guest: Guest, kind: str, *words: str, member: str = "CprLoad", filename: str = "") -> str:
    """The call must fail with this error, naming the VM and these words; returns the text."""
    with pytest.raises(CallError) as caught:
        if member == "CprLoad":
            guest.load(filename)
        elif member == "CprSave":
            guest.save(filename)
        else:
            guest.call(member)
    text = str(caught.value)
    assert caught.value.kind == kind, text
    for word in (f"VM {guest.name}", *words):
        assert word in text
    return text


# -- starting ---------------------------------------------------------------------------------------------------------


def test_a_missing_qemu_is_named(lab: Lab) -> None:
    guest = lab.guest(qemu="/usr/bin/qemu-of-nowhere")
    refused(guest, "QemuFailed", "/usr/bin/qemu-of-nowhere", "does not exist", member="Start")
    assert guest.state == "stopped"


def test_a_qemu_that_dies_at_start_is_quoted(lab: Lab) -> None:
    guest = lab.guest("web1", "-device", "no-such-device")
    refused(guest, "QemuFailed", "'no-such-device' is not a valid device", "Nothing runs", member="Start")
    assert guest.state == "stopped"


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
        ["/usr/bin/python3", "-I", "agent/cpr_agent/vm/launch.py", str(saved.lab.run / "vm/web1")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 78
    assert "there is no ticket" in ended.stderr


# -- saving -----------------------------------------------------------------------------------------------------------


def test_private_ram_is_refused(lab: Lab) -> None:
    guest = lab.running("web1", "-object", "memory-backend-ram,id=extra,size=16M")
    refused(guest, "Blocked", "extra", "private", member="CprSave")
    guest.assert_unbroken()
    assert guest.checkpoint_files() == []


def test_unnamed_ram_is_refused(each_lab: Lab) -> None:
    guest = each_lab.running("web1", "-object", "memory-backend-memfd,id=extra,size=16M,share=on")
    refused(guest, "Blocked", "extra", "no name outside QEMU", member="CprSave")
    guest.assert_unbroken()


def test_a_guest_under_record_and_replay_is_refused(lab: Lab) -> None:
    guest = lab.running("web1", "-icount", f"shift=auto,rr=record,rrfile={lab.root}/replay")
    refused(guest, "Blocked", "replay", member="CprSave")
    assert guest.state == "running"


def test_another_mode_is_refused(lab: Lab) -> None:
    guest = lab.running()
    with pytest.raises(CallError, match='Use mode "reboot"') as caught:
        guest.save(mode="restart")
    assert caught.value.kind == "InvalidArgument"
    guest.assert_unbroken()


def test_a_second_save_is_refused(saved: Guest) -> None:
    before = (saved.checkpoint / "vmstate").stat()
    refused(saved, "AlreadySaved", member="CprSave")
    assert (saved.checkpoint / "vmstate").stat() == before
    saved.load()
    saved.assert_unbroken()


def test_a_stopped_vm_can_not_be_saved(lab: Lab) -> None:
    refused(lab.guest(), "WrongState", "stopped", member="CprSave")


@pytest.mark.parametrize("filename", ["relative", "/etc/web1.state", "{exports}/../web1", "{exports}/no/web1", "{link}/x"])
def test_a_file_that_the_agent_could_not_justify_is_refused(lab: Lab, filename: str) -> None:
    guest = lab.running()
    (lab.exports / "link").symlink_to("/etc")
    refused(
        guest,
        "InvalidArgument",
        member="CprSave",
        filename=filename.format(exports=lab.exports, link=lab.exports / "link"),
    )
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


def test_a_file_that_exists_is_not_overwritten(lab: Lab) -> None:
    guest = lab.running()
    precious = lab.exports / "precious"
    precious.write_text("precious")
    refused(guest, "InvalidArgument", "exists", member="CprSave", filename=str(precious))
    assert precious.read_text() == "precious"
    guest.assert_unbroken()


def test_a_full_disk_leaves_the_guest_running(each_lab: Lab) -> None:
    lab = each_lab
    checkpoints = lab.state / "checkpoints"
    checkpoints.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    guest = lab.running()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", checkpoints], check=True)
    try:
        refused(guest, "SaveFailed", "No space left", "as before", member="CprSave")
        guest.assert_unbroken()
        assert guest.checkpoint_files() == []
        subprocess.run(["mount", "-o", "remount,size=8m", checkpoints], check=True)
        guest.save()
        guest.load()
        guest.assert_unbroken()
    finally:
        lab.close()
        subprocess.run(["umount", "--lazy", checkpoints], check=True)


def test_a_qemu_that_dies_during_the_save(lab: Lab) -> None:
    """Stopped dead while it is asked to save, and then killed: the moment can't be missed."""
    guest = lab.running()
    pid = guest.pid
    other = lab.running("other")
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    try:
        with pytest.raises(CallError) as caught:
            guest.save()
    finally:
        killer.join()
    assert "VM web1" in str(caught.value)
    assert caught.value.kind in ("QemuFailed", "SaveFailed", "WrongState")
    guest.until_state("stopped")
    assert guest.checkpoint_files() == []
    other.assert_unbroken()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_running_vm_is_not_loaded(lab: Lab) -> None:
    guest = lab.running()
    refused(guest, "AlreadyRunning", "was not touched")
    guest.assert_unbroken()


def test_nothing_saved_is_nothing_to_load(lab: Lab) -> None:
    refused(lab.guest(), "NoCheckpoint")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"", "NotVmstate", "it is empty"),
        (b"#!/bin/sh\n", "NotVmstate", "it starts with"),
        (b"QEVM\x00\x00\x00\x02more", "NotVmstate", "version is 2"),
        (b"QEVM\x00\x00\x00\x03more", "ProofFailed", "not the state that was saved"),
    ],
)
def test_a_file_that_is_not_the_state(saved: Guest, content: bytes, kind: str, said: str) -> None:
    other = saved.lab.exports / "other"
    other.write_bytes(content)
    pid = saved.pid
    refused(saved, kind, said, filename=str(other))
    assert saved.state == "saved"
    assert saved.pid == pid
    saved.load()
    saved.assert_unbroken()


def test_a_truncated_state_is_refused(saved: Guest) -> None:
    whole = saved.checkpoint / "vmstate"
    content = whole.read_bytes()
    os.truncate(whole, len(content) - 1000)
    refused(saved, "ProofFailed", "not the state that was saved")
    whole.write_bytes(content)
    saved.load()
    saved.assert_unbroken()


def test_the_state_of_another_vm_is_refused_by_name(saved: Guest) -> None:
    other = saved.lab.running("web2")
    other.save()
    copy = saved.lab.exports / "copy"
    shutil.copy(other.checkpoint / "vmstate", copy)
    refused(saved, "ProofFailed", "the state of VM web2", filename=str(copy))
    for guest in (saved, other):
        guest.load()
        guest.assert_unbroken()


def test_changed_memory_is_never_loaded(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    with saved.ram.open("r+b") as ram:
        ram.seek(8 << 20)
        ram.write(b"\xff" * 4096 * 64)
    refused(saved, "MemoryChanged", "its RAM is not what it was")
    assert saved.state == "held"
    assert "not what it was" in saved.properties["Problem"]
    assert saved.pid == 0
    assert (saved.checkpoint / "manifest.json").exists()
    refused(saved, "AlreadySaved", member="Start")


def test_replaced_memory_is_never_loaded(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    aside = saved.ram.with_name("aside")
    saved.ram.rename(aside)
    shutil.copy(aside, saved.ram)
    refused(saved, "MemoryChanged", "inode was")
    saved.ram.unlink()
    aside.rename(saved.ram)
    saved.load()
    saved.assert_unbroken()


def test_lost_memory_is_not_created_anew(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    saved.ram.unlink()
    refused(saved, "DeviceMissing", str(saved.ram))
    assert not saved.ram.exists()
    assert saved.state == "saved"


def test_a_qemu_that_dies_during_the_load_leaves_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """The wrapper becomes QEMU for a start, and dies with a message for a load, as long as a file says so."""
    wrapper = script(
        tmp_path / "qemu",
        f'#!/bin/sh\ncase "$*" in *-incoming*) [ -e {tmp_path}/well ] || {{ echo "I do not feel well" >&2; exit 1; }};; '
        f'esac\nexec {lab.qemu} "$@"\n',
    )
    guest = lab.guest(qemu=wrapper)
    guest.start()
    guest.until_counts()
    guest.save()
    refused(guest, "LoadFailed", "I do not feel well", "can be repeated")
    assert guest.state == "saved"
    (tmp_path / "well").touch()
    guest.load()
    guest.assert_unbroken()


def test_a_state_that_qemu_refuses_leaves_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """Another machine than the one that was saved: QEMU exits, and says so on stderr alone."""
    wrapper = script(
        tmp_path / "qemu",
        f'#!/bin/sh\ncase "$*" in *-incoming*) [ -e {tmp_path}/well ] || set -- "$@" -machine type=pc;; esac\n'
        f'exec {lab.qemu} "$@"\n',
    )
    guest = lab.guest(qemu=wrapper)
    guest.start()
    guest.until_counts()
    guest.save()
    refused(guest, "LoadFailed", "can be repeated")
    assert guest.state == "saved"
    (tmp_path / "well").touch()
    guest.load()
    guest.assert_unbroken()


def test_a_damaged_manifest_is_never_guessed_at(saved: Guest) -> None:
    saved.call("Stop", "s", "hard")
    path = saved.checkpoint / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"running"', b'"paused" '))
    refused(saved, "CheckpointUnreadable", "checksum", "cprctl discard web1")
    refused(saved, "CheckpointUnreadable", member="Start")
    assert path.exists()
    path.write_bytes(content)
    saved.load()
    saved.assert_unbroken()


def test_a_checkpoint_is_given_up_only_when_its_qemu_is_gone(saved: Guest) -> None:
    refused(saved, "WrongState", "cprctl resume web1", member="Discard")
    saved.call("Stop", "s", "hard")
    saved.call("Discard")
    assert saved.state == "stopped"
    refused(saved, "NoCheckpoint", member="Discard")
    saved.start()
    until(lambda: len(saved.report.boots) == 2, "a second boot")
