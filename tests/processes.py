# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that have a guest's memory open."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"


@contextmanager
def holding(path: Path, program: str = HOLDER) -> Iterator[subprocess.Popen[bytes]]:
    """One that has it open, until the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout
        holder.stdout.readline()
        yield holder
