# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for people: wrapped where they are read on a terminal, whole in a file or a pipe."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

NARROWEST = 20
"""Columns; a terminal that has fewer, or says so, breaks lines itself."""
DOCUMENTS = "/usr/share/doc/cpr-agent"
_PATH = re.compile(r"\s*/org/cpragent1(/[\w/]*)?")


def wrapped(text: str, first: str = "", stream: TextIO | None = None) -> str:
    """``text`` behind ``first``. On a terminal each line ends between words, and those that follow begin below the text."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return first + text
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    hanging = " " * min(len(first), width // 3)
    lines = text.split("\n")
    return "\n".join(
        textwrap.fill(
            line,
            width,
            initial_indent=first if number == 0 else hanging,
            subsequent_indent=hanging,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for number, line in enumerate(lines)
    )


def without_paths(text: str) -> str:
    """The text of an error as people read it: an object's path on the bus is no word of theirs."""
    return _PATH.sub("", text)


def of_vm(name: str, text: str) -> str:
    """``text`` where ``name`` stands before it already."""
    return text.removeprefix(f"VM {name}: ")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question for who has mistyped ``word``, or ""."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def fit_for_any_terminal() -> None:
    """One that has no UTF-8 shows a question mark for what it can't."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
