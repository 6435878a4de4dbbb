# SPDX-License-Identifier: GPL-2.0-or-later
"""Initrds are read to their end: every compression, several archives in one file, and whatever is cut off or damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from cpr_agent.host.kernels import archive, decompress
from cpr_agent.host.kernels.archive import read_initrd
from cpr_agent.host.kernels.decompress import BadArchive
from cpr_agent.host.kernels.images import Part
from tests.kernel_trees import COMPRESSORS, ROOT_MODULES, compressed, cpio, initrd, write

VERSION = "6.12.9-amd64"
EARLY = cpio({"kernel/x86/microcode/GenuineIntel.bin": b"microcode"})
SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "initrd.img"


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("how", COMPRESSORS)
def test_an_initrd_of_any_kind_is_read_to_its_end(path: Path, how: str, *, early: bool) -> None:
    contents = read_initrd(write(path, initrd(VERSION, how, early=early)))
    assert contents.init
    assert contents.modules == {*ROOT_MODULES}
    assert contents.versions == {VERSION}
    assert contents.compressions == ({f"RD_{how.upper()}"} if how != "none" else set())
    assert contents.unread == ""


@pytest.mark.parametrize("how", COMPRESSORS)
@pytest.mark.parametrize("zeros", [1, 3, 512, 70_000])
def test_padding_before_and_after_an_archive_is_skipped(path: Path, how: str, zeros: int) -> None:
    padded = EARLY + bytes(zeros * 4) + initrd(VERSION, how) + bytes(zeros)
    assert read_initrd(write(path, padded)).init


def test_four_archives_as_ubuntu_makes_them(path: Path) -> None:
    """Microcode of two makers, modules that are compressed themselves, and the rest."""
    loose = cpio({f"usr/lib/modules/{VERSION}/kernel/x/ext4.ko.zst": b"x"})
    contents = read_initrd(write(path, EARLY + EARLY + loose + initrd(VERSION, "zstd", ("virtio_blk",))))
    assert contents.modules == {"ext4", "virtio_blk"}
    assert contents.init


def test_the_kernels_words_for_its_boot_may_stand_at_the_end(path: Path) -> None:
    """Documentation/admin-guide/bootconfig.rst."""
    words = b"kernel.quiet = 1\n\0"
    bootconfig = words + len(words).to_bytes(4, "little") + sum(words).to_bytes(4, "little") + b"#BOOTCONFIG\n"
    assert read_initrd(write(path, initrd(VERSION, "gzip") + bootconfig)).init


def test_a_part_of_a_file_is_read_alone(path: Path) -> None:
    made = initrd(VERSION)
    write(path, b"header" + made + b"trailer")
    assert read_initrd(path, Part(6, len(made))).init
    with pytest.raises(BadArchive, match="is cut off"):
        read_initrd(path, Part(6, len(made) - 1))


@pytest.mark.parametrize("how", COMPRESSORS)
@SHARED
@given(data=st.data())
def test_an_initrd_that_is_cut_off_anywhere_is_refused(path: Path, how: str, data: st.DataObject) -> None:
    whole = initrd(VERSION, how).rstrip(b"\0") if how == "none" else initrd(VERSION, how)
    at = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(BadArchive):
        read_initrd(write(path, EARLY + whole[:at]))


@pytest.mark.parametrize("how", ["gzip", "bzip2", "xz", "lzma", "zstd", "lz4", "lzo"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_the_last_bytes_count(path: Path, how: str, cut: int) -> None:
    with pytest.raises(BadArchive):
        read_initrd(write(path, initrd(VERSION, how)[:-cut]))


@pytest.mark.parametrize("how", ["gzip", "bzip2", "xz", "zstd", "lzo"])
@SHARED
@given(data=st.data())
def test_a_damaged_byte_is_found_where_there_is_a_checksum(path: Path, how: str, data: st.DataObject) -> None:
    """Or it is one that nothing hangs on, such as the time in gzip's header, or a bit that zstd does not use."""
    made = bytearray(initrd(VERSION, how))
    whole = read_initrd(write(path, bytes(made)))
    at = data.draw(st.integers(0, len(made) - 1))
    made[at] ^= data.draw(st.integers(1, 255))
    try:
        assert read_initrd(write(path, bytes(made))) == whole
    except BadArchive:
        event("refused")


@SHARED
@given(content=st.binary(max_size=4000))
@example(b"070701")
@example(b"070701" + bytes(200))
@example(b"\x28\xb5\x2f\xfd")
@example(b"\x02\x21\x4c\x18")
@example(b"\x02\x21\x4c\x18\x01")
@example(b"\x1f\x8b")
@example(b"\xfd7zXZ")
def test_anything_else_is_refused_or_holds_nothing(path: Path, content: bytes) -> None:
    for start in (b"", b"070701", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"):
        try:
            contents = read_initrd(write(path, start + content))
        except BadArchive as bad:
            assert str(bad).startswith(("is ", "has ", "ends ", "unpacks "))
        else:
            assert not contents.init


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (compressed(cpio({"init": b"x"}), "gzip") + b"garbage", "neither an archive nor padding"),
        (cpio({"init": b"x" * 100})[:-400].rstrip(b"\0")[:-14], "ends without its trailer|is cut off"),
        (compressed(cpio({"init": b"x" * 999})[:600], "gzip"), "it ends within a file"),
        (compressed(cpio({"init": b"x"}).replace(b"TRAILER!!!", b"TRAILER???"), "zstd"), "without its trailer"),
        (compressed(b"no archive", "xz"), "no file begins|ends within a file"),
        (compressed(bytes(200) + b"\1", "gzip"), "which 4 does not divide|ends within"),
        (cpio({"init": b"x"}).replace(b"070701", b"070707", 1), "no file begins"),
    ],
    ids=("garbage after it", "cut off", "cut off within", "no trailer", "no archive", "padding", "another format"),
)
def test_an_archive_that_is_not_whole_is_refused(path: Path, content: bytes, said: str) -> None:
    with pytest.raises(BadArchive, match=said):
        read_initrd(write(path, content))


def test_xz_with_a_checksum_that_the_kernel_does_not_know_is_refused(path: Path) -> None:
    made = subprocess.run(["xz", "--check=crc64", "-c"], input=cpio({"init": b"x"}), capture_output=True, check=True).stdout
    with pytest.raises(BadArchive, match="--check=crc32"):
        read_initrd(write(path, made))


@pytest.mark.parametrize(("how", "program"), [("zstd", "zstd"), ("lz4", "lz4"), ("lzo", "lzop")])
def test_without_the_program_the_outside_is_looked_at(
    path: Path, how: str, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = initrd(VERSION, how)
    monkeypatch.setenv("PATH", str(tmp_path))
    contents = read_initrd(write(path, EARLY + made))
    assert contents.unread == f"{program} is not installed"
    assert not contents.init
    if how != "lzo":
        with pytest.raises(BadArchive, match="is cut off"):
            read_initrd(write(path, EARLY + made[:-2]))


def test_a_program_that_fails_says_why(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write(tmp_path / "bin/zstd", "#!/bin/sh\necho first >&2\necho 'out of memory' >&2\nexit 3\n").chmod(0o755)
    with pytest.raises(BadArchive, match="zstd says: out of memory"):
        read_initrd(write(path, initrd(VERSION)))


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_program_that_hangs_is_ended(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleep = os.path.realpath(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write(
        tmp_path / "bin/zstd",
        f"#!{sleep}\nimport os, signal\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n",
    ).chmod(0o755)
    began = time.monotonic()
    with pytest.raises(BadArchive, match="could not be read to its end within"):
        read_initrd(write(path, initrd(VERSION)), timeout_s=3)
    assert time.monotonic() - began < 30
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@pytest.mark.parametrize("how", ["gzip", "bzip2", "xz", "lzma", "zstd"])
def test_what_unpacks_to_too_much_is_refused(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "MOST_BYTES", 8 << 20)
    with pytest.raises(BadArchive, match="unpacks to more than"):
        read_initrd(write(path, compressed(cpio({"bomb": bytes(32 << 20)}), how)))


def test_what_has_too_many_files_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "MOST_ENTRIES", 20)
    with pytest.raises(BadArchive, match="has more than 20 files in it"):
        read_initrd(write(path, cpio({f"file{number}": b"x" for number in range(30)})))


def test_a_size_that_no_file_can_have_is_the_end(path: Path) -> None:
    made = bytearray(cpio({"init": b"x"}))
    at = made.index(b"init") - archive.HEADER_BYTES
    made[at + 54 : at + 62] = b"FFFFFFFF"
    with pytest.raises(BadArchive, match="it ends within a file"):
        read_initrd(write(path, bytes(made)))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_initrd(path)
