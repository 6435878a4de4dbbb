# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's log in the system's journal, with MESSAGE_IDs and fields; its level and target, which
org.freedesktop.LogControl1(5) sets.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from pystemd.journal import sendv

from cpr_agent.core.events import Event
from cpr_agent.errors import InvalidArgument

IDENTIFIER = "cpr-agentd"
MESSAGE_IDS: Mapping[Event, str] = {
    Event.HELD: "8e4b9ad1f2a3477c9c5f6d2f0f4d51a7",
    Event.MEMORY_LOST: "0d3c5a55a6c44d37b1f0a1bb3f6b9f42",
    Event.SAVED: "ded548eb1f6e4235bfe6140a55279170",
    Event.SAVE_FAILED: "8df5d81af2c34020b2f91bb8aa42fbba",
    Event.LOADED: "7238a166ab1f46f48e5639dcc369eb06",
    Event.LOAD_FAILED: "0293d2df859f40088aa9992832f8b999",
    Event.CLOCK_NOT_SET: "85e76b747d0b4f438f34988626b78663",
    Event.HOOK_FAILED: "d2e0c9feb0e9426fb4886720d25c13f2",
    Event.UPGRADE_BEGUN: "e041235291f9442ea7b4ade4b45ea827",
    Event.UPGRADE_REFUSED: "a40680dd44a64bbcb219b94ea473219c",
    Event.UPGRADE_COMMITTED: "770964438acf42808b67da492a1fe3c2",
    Event.UPGRADE_ROLLED_BACK: "9d4f2e3ddb894e60991b3bba89271bfb",
    Event.UPGRADE_DONE: "1695184a4ede4a15b63f84fa4b85c398",
    Event.UPGRADE_HELD: "2b9664b4020d4cf3825ae195e345f2a5",
}
"""units/cpr-agent.catalog explains each. Never change one: admins search for them."""

LEVELS = {
    "emerg": logging.CRITICAL,
    "alert": logging.CRITICAL,
    "crit": logging.CRITICAL,
    "err": logging.ERROR,
    "warning": logging.WARNING,
    "notice": logging.INFO,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
"""The levels of syslog(3), in its order."""
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class JournalHandler(logging.Handler):
    """Sends entries with the fields that core.events.about has put on a record (systemd.journal-fields(7))."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sendv(**entry(record, self.format(record)))
        except Exception:
            self.handleError(record)


def entry(record: logging.LogRecord, message: str) -> dict[str, str]:
    """The fields of a record's entry."""
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    if event := getattr(record, "cpr_event", None):
        fields["MESSAGE_ID"] = MESSAGE_IDS[event]
    about: Mapping[str, object] = getattr(record, "cpr_fields", {})
    fields.update({f"CPR_{name.upper()}": str(value) for name, value in about.items() if value != ""})
    # pystemd takes a value's length up to its first NUL.
    return {name: value.replace("\0", "\N{REPLACEMENT CHARACTER}") for name, value in fields.items()}


class LogControl:
    """The log's level and target: org.freedesktop.LogControl1(5). ``level`` is a word of syslog(3)."""

    identifier = IDENTIFIER

    def __init__(self, root: logging.Logger, level: str = "info") -> None:
        self._root = root
        self.level = level
        self.target = "journal" if _stderr_is_journal() else "console"
        self._apply()

    def set_level(self, level: str) -> None:
        """Raises InvalidArgument."""
        if level not in LEVELS:
            raise InvalidArgument(
                f"there is no log level {level!r}", left="nothing was changed", remedy=f"use {', '.join(LEVELS)}"
            )
        self.level = level
        self._apply()

    def set_target(self, target: str) -> None:
        """Raises InvalidArgument."""
        if target not in ("journal", "console"):
            raise InvalidArgument(f"can't log to {target!r}", left="nothing was changed", remedy="use journal or console")
        self.target = target
        self._apply()

    def _apply(self) -> None:
        handler: logging.Handler = JournalHandler() if self.target == "journal" else logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s" if self.target == "journal" else "%(levelname)s: %(message)s"))
        self._root.handlers[:] = [handler]
        self._root.setLevel(LEVELS[self.level])


def _stderr_is_journal() -> bool:
    """See JOURNAL_STREAM in systemd.exec(5)."""
    info = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
