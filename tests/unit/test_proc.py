# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process may make of its own entries in /proc: its name, its files and its maps cost the agent little, and end
nothing."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpr_agent.daemon import PROGRAMS
from cpr_agent.domains.host import maps_whole
from cpr_agent.handles import uid_of
from cpr_agent.host import this_host
from cpr_agent.host.processes import ProcessPlace
from cpr_agent.host.runner import RunFiles
from cpr_agent.host.this_host import ThisHost
from cpr_agent.memory.users import MAPS_BYTES, Wanted, find_users

NAMED = b"\xff) Z\nUid:\t1 1\x85"
"""Which is no UTF-8, and looks like the fields that come after it."""
RENAMED = f"import ctypes; ctypes.CDLL(None).prctl(15, {NAMED!r})\n"
"""PR_SET_NAME of prctl(2)."""


@contextmanager
def running(program: str, *words: str | Path) -> Iterator[int]:
    """The PID of one that waits, once it has done that."""
    wait = "\nprint(flush=True); import sys; sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program + wait, *words], stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield process.pid


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    ram = tmp_path / "\udcff\u2028 ram"
    ram.write_bytes(bytes(mmap.PAGESIZE))
    hold = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0)"
    with running(RENAMED + hold, ram) as pid, ram.open("rb") as file:
        assert uid_of(pid) == os.getuid()
        files = RunFiles(tmp_path / "run", tmp_path / "log", PROGRAMS)
        files.pid_file("web1").parent.mkdir(parents=True)
        started = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
        files.pid_file("web1").write_text(f"{pid} {started}")
        assert asyncio.run(ProcessPlace("web1", "web1", files).pid()) == pid
        assert maps_whole(pid, file.fileno(), 0, mmap.PAGESIZE)
        wanted = Wanted.at(ram)
        assert [user for _, user in find_users([wanted], {os.getpid()})[wanted]] == [pid]
        assert ThisHost().open_files(pid)


def test_as_many_maps_as_a_process_likes_are_looked_through_piece_by_piece(tmp_path: Path) -> None:
    """Here 4,000 with long paths; the kernel lets it have 65,530, and any local user may."""
    ram, deep = tmp_path / "ram", tmp_path.joinpath(*["d" * 240] * 12)
    ram.write_bytes(bytes(mmap.PAGESIZE))
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(bytes(8192))
    program = """
import mmap, sys
ram, file = (open(path, "r+b") for path in sys.argv[1:])
kept = [mmap.mmap(file.fileno(), 4096, prot=1 + 2 * (n % 2), offset=4096 * (n % 2)) for n in range(4000)]
kept.insert(2000, mmap.mmap(ram.fileno(), 0))
ram.close()
"""
    with running(program, ram, deep / "file") as pid:
        assert len(Path(f"/proc/{pid}/maps").read_bytes()) > 8 * MAPS_BYTES
        wanted = Wanted.at(ram)
        others = {int(one) for one in os.listdir("/proc") if one.isdigit()} - {pid}  # noqa: PTH208
        tracemalloc.start()
        try:
            assert [user for _, user in find_users([wanted], others)[wanted]] == [pid]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * MAPS_BYTES


def test_as_many_files_as_a_process_likes_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_host, "MAX_OPEN_FILES", 20)
    opening = "import sys; kept = [open(f'{sys.argv[1]}/{n}', 'w') for n in range(100)]"
    with running(opening, tmp_path) as pid:
        found = ThisHost().open_files(pid)
    assert len(found) == 20
