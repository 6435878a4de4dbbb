# SPDX-License-Identifier: GPL-2.0-or-later
"""A program on a terminal of its own, which script(1) gives it: what it shows, and what is typed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.lab import PATIENCE_S, until

ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>]|\][^\x07]*\x07|\([B0])")


class Terminal:
    """``command`` is a line for a shell; what it shows goes to a file in ``directory``."""

    def __init__(self, directory: Path, command: str, **environment: str) -> None:
        self._log = directory / "typescript"
        self._process = subprocess.Popen(
            # A dash that waits for the program would give Ctrl-C an exit code of its own.
            ["script", "-qefc", f"exec {command}", str(self._log)],
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

    @property
    def raw(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def shown(self) -> str:
        """Without what moves the cursor and colours the text."""
        return ANSI.sub("", self.raw)

    def until_shows(self, words: str) -> None:
        until(lambda: words in self.shown, f"the terminal shows {words!r}, not only {self.shown!r}")

    def type(self, keys: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(keys.encode())
        self._process.stdin.flush()

    def ended(self) -> int:
        return self._process.wait(PATIENCE_S)
