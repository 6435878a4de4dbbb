# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that are kept, of real processes."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.host.programs import KeptPrograms
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
