# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel tells of a domain's QEMU and of libvirt's daemon, by real processes."""

from __future__ import annotations

import getpass
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpr_agent.domains.host import (
    adopted,
    has_image_open,
    has_open,
    is_adopted,
    kill,
    maps_whole,
    qemu_pid,
    qemu_uid,
    qemus_named,
)
from cpr_agent.errors import QemuFailed

PAGE = mmap.PAGESIZE


@contextmanager
def process(*words: str, holding: Path | None = None, user: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """One that waits to be ended; with ``holding`` a file is its stdin."""
    wait = "import sys; print('there', flush=True); sys.stdin.fileno(); import signal; signal.pause()"
    with (holding or Path(os.devnull)).open("rb") as stdin:
        child = subprocess.Popen(["/usr/bin/python3", "-c", wait, *words], stdin=stdin, stdout=subprocess.PIPE, user=user)
    try:
        assert child.stdout
        child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


# -- whose QEMU ------------------------------------------------------------------------------------------------------------


def test_a_domain_s_qemu_is_the_one_in_libvirt_s_file(tmp_path: Path) -> None:
    name = f"web{os.getpid()}"  # other tests have QEMUs, too
    with process("-name", f"guest={name},debug-threads=on") as qemu:
        (tmp_path / "web1.pid").write_text(f"{qemu.pid}\n")
        assert qemu_pid(tmp_path / "web1.pid", name) == qemu.pid
        assert qemu_pid(tmp_path / "web1.pid", "web") == 0
        assert qemus_named(name, getpass.getuser()) == [qemu.pid]


@pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user needs root")
def test_a_process_of_any_other_user_is_no_vm_s_qemu() -> None:
    name = f"web{os.getpid()}"
    with process(f"guest={name}", user="nobody") as other:
        assert qemus_named(name, "root") == []
        assert qemus_named(name, "nobody") == [other.pid]


@pytest.mark.parametrize("text", ["", "not a number", "999999999"], ids=["empty", "garbage", "gone"])
def test_a_file_that_outlived_its_qemu_names_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "web1.pid").write_text(text)
    assert qemu_pid(tmp_path / "web1.pid", "web1") == 0


def test_a_process_that_took_the_number_is_no_qemu_and_is_not_ended(tmp_path: Path) -> None:
    with process("something", "else") as other:
        (tmp_path / "web1.pid").write_text(str(other.pid))
        assert qemu_pid(tmp_path / "web1.pid", "web1") == 0
        assert kill(other.pid, "web1")
        assert other.poll() is None


def test_a_qemu_is_ended() -> None:
    with process("guest=web1") as qemu:
        assert kill(qemu.pid, "web1")
        assert qemu.wait() == -9


# -- the memory that it has ------------------------------------------------------------------------------------------------


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(bytes(8 * PAGE))
    return path


@pytest.mark.parametrize(
    ("offset", "size", "whole"),
    [(0, 4, True), (0, 2, True), (0, 5, False), (2, 2, False), (4, 4, False)],
    ids=["just that", "and more", "less", "from elsewhere", "another part"],
)
def test_memory_counts_if_all_of_it_is_mapped(ram: Path, offset: int, size: int, *, whole: bool) -> None:
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), 4 * PAGE):
        assert maps_whole(os.getpid(), file.fileno(), offset * PAGE, size * PAGE) is whole


def test_memory_at_an_offset_counts(ram: Path) -> None:
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE, offset=4 * PAGE):
        assert maps_whole(os.getpid(), file.fileno(), 4 * PAGE, 2 * PAGE)


def test_private_memory_does_not_count(ram: Path) -> None:
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), 4 * PAGE, flags=mmap.MAP_PRIVATE):
        assert not maps_whole(os.getpid(), file.fileno(), 0, 4 * PAGE)


def test_another_file_with_the_same_path_does_not_count(ram: Path) -> None:
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), 4 * PAGE):
        ram.unlink()
        ram.write_bytes(bytes(8 * PAGE))
        with ram.open("rb") as other:
            assert not maps_whole(os.getpid(), other.fileno(), 0, 4 * PAGE)
        assert maps_whole(os.getpid(), file.fileno(), 0, 4 * PAGE)


def test_a_process_that_has_ended_has_nothing_mapped(ram: Path) -> None:
    with process() as child:
        pass
    with ram.open("rb") as file:
        assert not maps_whole(child.pid, file.fileno(), 0, PAGE)


# -- the image that libvirt reads ------------------------------------------------------------------------------------------


def test_a_daemon_or_its_helper_has_the_image_open(ram: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    other.write_bytes(ram.read_bytes())
    with process(holding=ram) as daemon:
        assert has_open(daemon.pid, ram)
        assert not has_open(daemon.pid, other)
        assert has_open(os.getpid(), ram), "the daemon's child has it"
    assert not has_open(os.getpid(), ram)


def test_a_daemon_that_has_another_image_open_restores_that(tmp_path: Path) -> None:
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(b"LibvirtQemudSave and so on <domain><name>web1</name>")
    other.write_bytes(b"anything else, and <name>web1</name>")
    with process(holding=image) as daemon:
        assert has_image_open(daemon.pid, "web1")
        assert not has_image_open(daemon.pid, "web"), "it restores another domain at the same time"
    with process(holding=other) as daemon:
        assert not has_image_open(daemon.pid, "web1")


def test_an_image_that_was_replaced_meanwhile_is_not_the_one_that_is_open(ram: Path) -> None:
    with process(holding=ram) as daemon:
        ram.unlink()
        ram.write_bytes(b"another")
        assert not has_open(daemon.pid, ram)


# -- libvirt's files -------------------------------------------------------------------------------------------------------


def test_the_adopted_domains_are_those_with_the_agent_s_namespace(tmp_path: Path) -> None:
    (tmp_path / "web1.xml").write_text("<domain><cpr:vm xmlns:cpr='urn:us'/></domain>")
    (tmp_path / "web2.xml").write_text("<domain/>")
    (tmp_path / "a name with spaces.xml").write_text("urn:us")
    (tmp_path / "networks").mkdir()
    assert [name for name, _ in adopted(tmp_path, b"urn:us")] == ["web1"]
    assert list(adopted(tmp_path / "nothing", b"urn:us")) == []
    assert is_adopted(tmp_path / "web1.xml", b"urn:us")
    assert not is_adopted(tmp_path / "gone.xml", b"urn:us")


@pytest.mark.parametrize("named", [getpass.getuser(), f"+{os.getuid()}", str(os.getuid())], ids=["name", "plus", "number"])
def test_the_user_of_qemu_is_that_of_the_configuration(tmp_path: Path, named: str) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_text(f'# user = "nobody"\nuser = "{named}"\n')
    assert qemu_uid(conf) == os.getuid()


@pytest.mark.parametrize("text", ['user = "no such user"\n', "user = [\n"], ids=["unknown", "garbage"])
def test_a_user_of_qemu_that_is_not_known_starts_nothing(tmp_path: Path, text: str) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_text(text)
    with pytest.raises(QemuFailed, match=r"qemu.conf"):
        qemu_uid(conf)
