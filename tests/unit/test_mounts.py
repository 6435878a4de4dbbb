# SPDX-License-Identifier: GPL-2.0-or-later
"""What /proc/self/mountinfo says, read for memory and for kernels alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpr_agent.mounts import Mount, mounts

LINE = "36 35 259:1 /of/it /mnt/pmem rw,noatime master:1 shared:7 - ext4 /dev/pmem0p1 rw,dax=always"


@pytest.mark.parametrize("tags", ["", "master:1 ", "master:1 shared:7 "])
def test_a_mount_has_the_options_of_the_mount_and_of_its_file_system(tmp_path: Path, tags: str) -> None:
    (tmp_path / "mountinfo").write_text(LINE.replace("master:1 shared:7 ", tags) + "\n")
    options = frozenset({"rw", "noatime", "dax=always"})
    assert mounts(tmp_path / "mountinfo") == [Mount("259:1", "/mnt/pmem", "ext4", "/dev/pmem0p1", options)]


def test_a_path_that_is_not_utf_8_and_a_source_without_a_name_are_no_trouble(tmp_path: Path) -> None:
    """The kernel escapes blanks, newlines and backslashes alone (mangle() in fs/proc_namespace.c)."""
    lines = LINE.encode().replace(b"/mnt/pmem", b"/mnt/\xff\xe2\x80\xa8\x0b\r"), LINE.encode().replace(b"/dev/pmem0p1", b"")
    (tmp_path / "mountinfo").write_bytes(b"\n".join(lines) + b"\n")
    strange, nameless = mounts(tmp_path / "mountinfo")
    assert strange.point == "/mnt/\udcff\u2028\x0b\r"
    assert (nameless.kind, nameless.source, "dax=always" in nameless.options) == ("ext4", "", True)


def test_this_host_has_a_root_and_a_proc() -> None:
    assert {"/", "/proc"} <= {mount.point for mount in mounts()}
