# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m scripts.bench.journal [RECORDS]: how long the journal takes to be opened and to be compacted.

Its files are on the disk of the current directory. Times are of the wall clock, the best of five for an open.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path

from cpr_agent.host.this_host import ThisHost
from cpr_agent.store import journal
from tests.journals import write, years

ROUNDS = 5


def main() -> int:
    count = int(sys.argv[1]) if sys.argv[1:] else 100_000
    journal.GROWN_RECORDS = journal.GROWN_BYTES = sys.maxsize  # not at the open that is to be measured
    gc.disable()  # as the agent does while it starts
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        path = Path(directory) / "journal"
        write(path, years(count))
        print(_opened(path, "before"))
        one = journal.FileJournal(path, ThisHost(), ThisHost())
        begin = time.perf_counter()
        one.compact()
        print(f"compaction: {(time.perf_counter() - begin) * 1e3:.0f} ms")
        one.close()
        print(_opened(path, "after"))
    return 0


def _opened(path: Path, when: str) -> str:
    times_s = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        one = journal.FileJournal(path, ThisHost(), ThisHost())
        times_s.append(time.perf_counter() - begin)
        one.close()
    lines = path.read_bytes().count(b"\n")
    return f"{when}: {lines} records, {path.stat().st_size >> 10} KiB, opened in {min(times_s) * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
