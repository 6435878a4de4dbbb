# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints and journal: whole or not at all, and nothing is guessed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpr_agent.core.model import MANIFEST_SCHEMA, Difference, Held, Manifest, Vmstate
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.daemon import PROGRAMS
from cpr_agent.errors import CheckpointUnreadable, InvalidArgument, NotVmstate, ProofFailed
from cpr_agent.files import write_atomically
from cpr_agent.host.runner import RunFiles
from cpr_agent.host.this_host import ThisHost
from cpr_agent.store import vmstate
from cpr_agent.store.checkpoints import CheckpointStore
from cpr_agent.store.journal import FileJournal
from cpr_agent.store.reserve import RESERVE_BYTES
from tests.samples import launch, manifest

STATE = b"QEVM\x00\x00\x00\x03" + b"device state" * 100


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "exports").mkdir()
    return CheckpointStore(tmp_path / "checkpoints", (tmp_path / "exports",))


def save(store: CheckpointStore, vm: str = "web1", filename: str = "", content: bytes = STATE) -> Manifest:
    pending = store.begin(vm, filename)
    os.write(pending.fd, content)
    saved = manifest(vm=vm, vmstate=pending.seal())
    pending.commit(saved)
    return saved


def test_a_checkpoint_is_live_once_it_is_committed(store: CheckpointStore) -> None:
    pending = store.begin("web1", "")
    os.write(pending.fd, STATE)
    vmstate = pending.seal()
    assert store.live("web1") is None
    assert vmstate.sha256 == hashlib.sha256(STATE).hexdigest()
    saved = manifest(vmstate=vmstate)
    pending.commit(saved)
    assert store.live("web1") == saved
    assert store.live_all() == ["web1"]


def test_an_aborted_save_leaves_nothing(store: CheckpointStore) -> None:
    pending = store.begin("web1", "")
    os.write(pending.fd, STATE)
    vmstate = pending.seal()
    pending.commit(manifest(vmstate=vmstate))
    pending.abort()
    assert store.live("web1") is None
    assert list((store.root / "web1").iterdir()) == []


@pytest.mark.parametrize("act", ["consume", "discard"])
def test_a_spent_checkpoint_is_kept_as_evidence_but_never_live(store: CheckpointStore, act: str) -> None:
    saved = save(store)
    if act == "consume":
        store.consume(saved)
    else:
        store.discard("web1")
    assert store.live("web1") is None
    suffix = {"consume": "loaded", "discard": "discarded"}[act]
    assert sorted(p.name for p in (store.root / "web1").iterdir()) == [f"manifest.json.{suffix}", f"vmstate.{suffix}"]
    assert save(store) == store.live("web1")


@pytest.mark.parametrize("moved", [["manifest.json"], ["manifest.json", "vmstate"]], ids=["manifest", "both"])
def test_a_consumption_that_was_interrupted_is_undone_beside_an_older_one(store: CheckpointStore, moved: list[str]) -> None:
    """The older checkpoint's files are aside too, until the newer one's have moved over them."""
    store.consume(save(store, content=STATE + b"older"))
    saved = save(store)
    for name in moved:
        path = store.root / "web1" / name
        path.rename(path.with_name(f"{name}.loaded"))
    store.restore("web1", saved.id)
    assert store.live("web1") == saved
    os.close(store.open_vmstate(saved, ""))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_manifest_with_any_byte_changed_is_unreadable_or_equal(store: CheckpointStore, data: st.DataObject) -> None:
    if store.checkpointed("web1"):  # of the example before
        store.discard("web1")
    saved = save(store)
    path = store.root / "web1/manifest.json"
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        assert store.live("web1") == saved
    except CheckpointUnreadable as error:
        assert "cprctl discard web1" in str(error)
    assert path.exists()


def test_a_manifest_that_was_read_before_is_read_again_once_it_is_another(store: CheckpointStore) -> None:
    saved = save(store)
    assert store.live("web1") is store.live("web1")
    path = store.root / "web1/manifest.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"web1", b"web2"))
    with pytest.raises(CheckpointUnreadable):
        store.live("web1")
    path.write_bytes(content)
    assert store.live("web1") == saved
    store.consume(saved)
    assert store.live("web1") is None
    again = save(store, content=STATE + b"newer")
    assert store.live("web1") == again != saved


def test_a_sealed_state_is_found_by_the_next_agent_and_an_older_one_is_not(store: CheckpointStore) -> None:
    (store.root / "web1").mkdir(parents=True)
    (store.root / "web1/vmstate").write_bytes(STATE + b"older")
    pending = store.begin("web1", "")
    assert not Path(pending.path).exists()
    os.write(pending.fd, STATE)
    sealed = pending.seal()
    again = store.reopen("web1", pending.path)
    assert again.seal() == sealed
    again.commit(manifest(vmstate=sealed))
    os.close(store.open_vmstate(manifest(vmstate=sealed), ""))


def test_a_truncated_manifest_is_unreadable(store: CheckpointStore) -> None:
    save(store)
    path = store.root / "web1/manifest.json"
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointUnreadable):
            store.live("web1")
        assert store.checkpointed("web1")


def test_what_is_no_file_or_can_t_be_read_is_unreadable_too(store: CheckpointStore) -> None:
    """As on a disk with an error: the VM is held, and no question about all VMs fails by it."""
    save(store)
    for name in ("manifest.json", "held"):
        (store.root / "web1" / name).unlink(missing_ok=True)
        (store.root / "web1" / name).mkdir()
    with pytest.raises(CheckpointUnreadable, match="Is a directory"):
        store.live("web1")
    assert store.checkpointed("web1")
    held = store.held("web1")
    assert held
    assert "cannot be read" in held.reason


def test_a_manifest_of_another_vm_is_unreadable(store: CheckpointStore) -> None:
    save(store, "web2")
    (store.root / "web2").rename(store.root / "web1")
    with pytest.raises(CheckpointUnreadable, match="belongs to VM web2"):
        store.live("web1")


@pytest.mark.parametrize("content", [b"", b"QEVM", b"QEVM\x00\x00\x00\x04", b"MZ" + STATE])
def test_what_qemu_wrote_must_look_like_a_state(store: CheckpointStore, content: bytes) -> None:
    pending = store.begin("web1", "")
    os.write(pending.fd, content)
    with pytest.raises(NotVmstate):
        pending.seal()
    pending.abort()


def test_only_the_very_state_is_opened(store: CheckpointStore) -> None:
    saved, other = save(store), save(store, "web2", content=STATE + b"!")
    fd = store.open_vmstate(saved, "")
    assert os.read(fd, 4) == b"QEVM"
    os.close(fd)
    path = Path(saved.vmstate.path)
    path.write_bytes(STATE[:-1] + b"?")
    with pytest.raises(ProofFailed, match="is not the state that was saved"):
        store.open_vmstate(saved, "")
    path.write_bytes(Path(other.vmstate.path).read_bytes())
    with pytest.raises(ProofFailed, match="the state of VM web2"):
        store.open_vmstate(saved, "")
    path.unlink()
    path.symlink_to(other.vmstate.path)
    with pytest.raises(NotVmstate):
        store.open_vmstate(saved, "")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NotVmstate, match="not a regular file"):
        store.open_vmstate(saved, "")


def test_files_are_confined(store: CheckpointStore, tmp_path: Path) -> None:
    exports = store.files.directories[0]
    (exports / "sub").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (exports / "link").symlink_to(tmp_path / "elsewhere")
    for filename in ("x", f"{exports}/../x", f"{tmp_path}/x", f"{exports}/link/x", f"{exports}/none/x", "/etc/passwd"):
        with pytest.raises(InvalidArgument):
            store.begin("web1", filename)
    save(store, filename=str(exports / "sub/state"))
    store.discard("web1")
    assert [p.name for p in (exports / "sub").iterdir()] == ["state.discarded"]


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    path.with_name(".file.tmp").mkdir()
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_journal_is_read_back(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal", ThisHost(), ThisHost())
    journal.append("save-begin", vm="web1", run_state="running")
    journal.append("saved", vm="web1")
    journal.close()
    again = FileJournal(tmp_path / "journal", ThisHost(), ThisHost())
    assert [record["event"] for record in again.records()] == ["save-begin", "saved"]
    assert again.records()[0]["run_state"] == "running"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(0, 700))
def test_a_journal_cut_anywhere_yields_a_prefix_and_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    path.unlink(missing_ok=True)
    journal = FileJournal(path, ThisHost(), ThisHost())
    for number in range(4):
        journal.append("event", number=number)
    journal.close()
    path.write_bytes(path.read_bytes()[:cut])
    journal = FileJournal(path, ThisHost(), ThisHost())
    kept = len(journal.records())
    assert [record["number"] for record in journal.records()] == list(range(kept))
    journal.append("event", number=kept)
    journal.close()
    assert [r["number"] for r in FileJournal(path, ThisHost(), ThisHost()).records()] == list(range(kept + 1))


def test_a_journal_damaged_in_the_middle_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = FileJournal(path, ThisHost(), ThisHost())
    for number in range(3):
        journal.append("event", number=number)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"event", b"evens") + lines[2])
    journal = FileJournal(path, ThisHost(), ThisHost())
    assert [record["number"] for record in journal.records()] == [0]
    assert len(list(tmp_path.glob("journal.damaged-*"))) == 1


def state_file(path: Path, machine: bytes = b"pc-q35-10.0", cpus: int = 2) -> bytes:
    """What QEMU writes around the sections of devices (migration/savevm.c)."""
    devices = [{"name": "cpu_common", "instance_id": n} for n in range(cpus)] + [{"name": "apic"}]
    description = json.dumps({"page_size": 4096, "devices": devices}).encode()
    data = b"QEVM\0\0\0\x03\x07" + len(machine).to_bytes(4, "big") + machine + b"\x06device\x06\0"
    data += b"\x06" + len(description).to_bytes(4, "big") + description
    path.write_bytes(data)
    return data


def inspected(path: Path) -> Vmstate:
    with path.open("rb") as file:
        return vmstate.inspect(file.fileno(), str(path), "web1")


def test_a_state_file_larger_than_any_state_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "vmstate"
    path.write_bytes(STATE)
    os.truncate(path, vmstate.MAX_BYTES + 1)
    with pytest.raises(NotVmstate, match="more than the 268435456"):
        inspected(path)


def test_a_state_file_that_is_slow_to_parse_is_not_parsed(tmp_path: Path) -> None:
    """Each byte 0x06 could begin the description."""
    path = tmp_path / "vmstate"
    path.write_bytes(STATE + b"\x06" * (8 << 20))
    began = time.process_time()
    assert inspected(path).cpus == 0
    assert time.process_time() - began < 2


def test_a_state_file_says_of_which_machine_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vmstate"
    data = state_file(path)
    found = inspected(path)
    assert (found.machine, found.cpus, found.size_bytes) == ("pc-q35-10.0", 2, len(data))
    path.write_bytes(data[:-1])
    assert (inspected(path).machine, inspected(path).cpus) == ("pc-q35-10.0", 0)


def test_a_state_file_without_a_description_says_how_many_cpus_it_is_of(tmp_path: Path) -> None:
    """As cpr-save writes it: by the sections, each of which begins with its number, its name, its instance and version."""
    path = tmp_path / "vmstate"
    sections = b"".join(
        b"\x04" + number.to_bytes(4, "big") + b"\x0acpu_common" + cpu.to_bytes(4, "big") + b"\0\0\0\1state\x7e"
        for number, cpu in enumerate(range(3), 5)
    )
    path.write_bytes(b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0" + sections + b"\0")
    assert (inspected(path).machine, inspected(path).cpus) == ("pc-q35-10.0", 3)


@given(st.binary(max_size=300))
def test_any_bytes_after_the_header_are_no_reason_to_fail(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vmstate"
        path.write_bytes(b"QEVM\0\0\0\x03" + data)
        assert inspected(path).size_bytes == len(data) + 8


def test_why_a_vm_is_held_is_kept_with_the_evidence(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ())
    held = Held(reason="no", error="MemoryChanged", at=1.0, evidence=(Difference("inode", "1", "2"),))
    store.hold("web1", held)
    assert store.held("web1") == held
    (tmp_path / "web1/held").write_bytes(b"\xff")
    unreadable = store.held("web1")
    assert unreadable
    assert "cannot be read" in unreadable.reason


# -- what an older agent wrote ----------------------------------------------------------------------------------------

SCHEMA_1 = Path(__file__).parent / "schema-1"
"""Written by the agent before a VM could have several ranges of memory."""


def test_a_checkpoint_of_an_older_agent_is_the_same(store: CheckpointStore) -> None:
    (store.root / "web1").mkdir(parents=True)
    (store.root / "web1/manifest.json").write_bytes((SCHEMA_1 / "manifest.json").read_bytes())
    assert store.live("web1") == manifest()


def test_a_qemu_that_an_older_agent_started_is_known(tmp_path: Path) -> None:
    (tmp_path / "launched").mkdir()
    (tmp_path / "launched/web1.json").write_bytes((SCHEMA_1 / "launch.json").read_bytes())
    assert RunFiles(tmp_path, tmp_path, PROGRAMS).launch("web1") == launch()


def test_a_checkpoint_of_a_newer_agent_is_not_guessed_at(store: CheckpointStore) -> None:
    pending = store.begin("web1", "")
    os.write(pending.fd, STATE)
    pending.commit(manifest(vmstate=pending.seal(), schema=MANIFEST_SCHEMA + 1))
    said = f"its schema is {MANIFEST_SCHEMA + 1}, this agent reads up to {MANIFEST_SCHEMA}"
    with pytest.raises(CheckpointUnreadable, match=said):
        store.live("web1")


FIRST_READS = """
import sys, threading
sys.setswitchinterval(1e-6)
import cpr_agent.daemon
from pathlib import Path
from cpr_agent.store import checkpoints, history, schema, vmstate
from cpr_agent.vm.definition import read_definition

state, manifest, timeline, held, definition = (path.read_bytes() for path in map(Path, sys.argv[1:]))
together = threading.Barrier(8)


def read():
    together.wait()
    assert vmstate._description(state).devices[0].name == "timer"
    assert schema.read_manifest(manifest).vm == "web1"
    assert history._TIMELINE.decode(timeline).vm == "web1"
    assert checkpoints._HELD.decode(held).reason == "why"
    assert read_definition(Path("web1.toml"), definition).name == "web1"


threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_may_be_the_first_to_read_anything(tmp_path: Path) -> None:
    """An agent ended in a segmentation fault as three guests were saved: msgspec worked out the same type in three threads.
    Without its decoders this fails in one run of three."""
    description = b'{"devices": [{"name": "timer", "instance_id": 0}]}'
    timeline = GuestTimeline(
        id="c0ffee", vm="web1", upgrade="", kernel_before="", kernel_after="", by_kexec=True, stopped_at=1.0, saved_at=1.0,
        shutdown_at=1.0, userspace_at=1.0, load_at=1.0, memory_at=1.0, resumed_at=1.0,
    )  # fmt: skip
    contents = (
        STATE + b"\x06" + len(description).to_bytes(4, "big") + description,
        msgspec.json.encode(manifest()),
        msgspec.json.encode(timeline),
        msgspec.json.encode(Held(reason="why", evidence=(Difference("a", "b", "c"),))),
        b'[memory]\nsize = "64M"\ndevice = "/dev/shm/web1"\n[vm]\n[save]\ntimeout = "20s"\n',
    )
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    for _ in range(12):
        subprocess.run([sys.executable, "-c", FIRST_READS, *paths], check=True)


# -- a full disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a journal; once there is a file "full", its only room is what the journal gives up."""
    write, root = os.write, tmp_path

    def write_if_there_is_room(fd: int, data: bytes) -> int:
        if (root / "full").exists() and (root / "journal.reserve").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_if_there_is_room)
    return tmp_path


def test_the_journal_keeps_room_for_a_full_disk(disk: Path) -> None:
    journal = FileJournal(disk / "journal", ThisHost(), ThisHost())
    journal.append("start", vm="web1")
    assert (disk / "journal.reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    (disk / "full").touch()
    journal.append("save-undone", vm="web1")
    assert not (disk / "journal.reserve").exists()
    (disk / "full").unlink()
    journal.append("resumed", vm="web1")
    assert (disk / "journal.reserve").exists()
    journal.close()
    assert [record["event"] for record in FileJournal(disk / "journal", ThisHost(), ThisHost()).records()] == [
        "start",
        "save-undone",
        "resumed",
    ]


def test_without_room_there_is_no_reserve_and_the_journal_is_what_it_was(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    journal = FileJournal(disk / "journal", ThisHost(), ThisHost())
    journal.append("start", vm="web1")
    assert not (disk / "journal.reserve").exists()
    (disk / "journal.reserve").touch()  # whatever makes the write fail
    (disk / "full").touch()
    with pytest.raises(OSError, match="No space left"):
        journal.append("save-begin", vm="web1")
    assert [record["event"] for record in journal.records()] == ["start"]


def test_a_hold_ends_before_its_checkpoint(store: CheckpointStore) -> None:
    """An agent that dies in between leaves a checkpoint that is proved again, and no hold that stops another guest."""
    save(store)
    store.hold("web1", Held(reason="no"))
    in_the_way = store.root / "web1/manifest.json.loaded/x"
    in_the_way.mkdir(parents=True)
    live = store.live("web1")
    assert live
    with pytest.raises(OSError, match="directory|exists"):
        store.consume(live)
    assert store.held("web1") is None
    assert store.live("web1") == live
