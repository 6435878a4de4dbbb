# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that are kept, of real processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.host.programs import KeptPrograms
from cpr_agent.host.this_host import ThisHost
from tests.lab import until

WORDS = ("infinity", "1")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """With what lies beside it."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/share").mkdir()
    (tmp_path / "usr/share/rom").write_text("firmware")
    return Path(shutil.copy("/bin/sleep", tmp_path / "usr/bin/sleeper"))


@contextlib.contextmanager
def runs(*command: str | Path) -> Iterator[int]:
    """Its PID, once it is that program."""
    with subprocess.Popen([*command, *WORDS]) as process:
        try:
            until(Path(f"/proc/{process.pid}/cmdline").read_bytes, "it has its arguments")
            yield process.pid
        finally:
            process.kill()


def test_a_program_that_has_no_name_any_more_can_be_run_again(tmp_path: Path, program: Path) -> None:
    programs = KeptPrograms(tmp_path / "cache/programs")
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    with runs(program) as pid:
        program.unlink()
        programs.keep("web1", pid, WORDS)
        programs.keep("web1", pid, WORDS)
    kept = Path(programs.kept("web1", digest))
    assert kept == tmp_path / "cache/programs/web1/bin/sleeper"
    assert (kept.parent / "../share/rom").read_text() == "firmware"
    assert {oct(path.stat().st_mode & 0o777) for path in (kept, *kept.parents[:4])} == {"0o755"}
    assert programs.kept("web1", "0" * 64) == programs.kept("web2", digest) == ""
    with runs(kept) as pid:  # brought back, and kept once more
        programs.keep("web1", pid, WORDS)
    assert (kept.parent / "../share/rom").read_text() == "firmware"
    programs.forget("web1")
    assert programs.kept("web1", digest) == ""
    assert (tmp_path / "usr/share/rom").exists()


def test_what_a_wrapper_has_started_is_not_kept(tmp_path: Path, program: Path) -> None:
    programs = KeptPrograms(tmp_path / "cache/programs")
    with runs(program, "2") as pid, pytest.raises(OSError, match="a wrapper has started it"):
        programs.keep("web1", pid, WORDS)
    assert not (tmp_path / "cache").exists()


def test_a_qemu_s_version_is_read_from_its_program(tmp_path: Path) -> None:
    """Also where it lies over the border of what is read at a time; and of the program that has taken its place."""
    program = tmp_path / "qemu"
    says = b"QEMU emulator version %s\nCopyright"
    host = ThisHost()
    for at in (0, (1 << 20) - 5, (1 << 20) - 25, 3 << 20):
        program.write_bytes(bytes(at) + says % b"10.0.2 (Debian 1:10.0.2+ds-2)" + bytes(4096))
        assert host.program_version(str(program)) == "10.0.2 (Debian 1:10.0.2+ds-2)"
    program.write_bytes(says % b"\x1b[31m\xff")
    assert host.program_version(str(program)) == "\\x1b[31m\N{REPLACEMENT CHARACTER}"


def test_what_is_no_qemu_has_no_version(tmp_path: Path) -> None:
    (tmp_path / "wrapper").write_text("#!/bin/sh\nexec qemu-system-x86_64\n")
    os.mkfifo(tmp_path / "fifo")
    for name in ("wrapper", "fifo", "gone", "."):
        assert ThisHost().program_version(str(tmp_path / name)) == ""
    program = shutil.which("qemu-system-x86_64")
    if program:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        assert said == f"QEMU emulator version {ThisHost().program_version(program)}"
