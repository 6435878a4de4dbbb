# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: a checksummed record a line, durable before the act that it announces (invariant 5).

It is only appended to, but for its compaction, which leaves out what no later decision or report needs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from cpr_agent.core.past import COMPACTED, Past, Pasts, Record
from cpr_agent.core.ports import Boot, Clock
from cpr_agent.files import make_private_directory, open_own, sync_directory, write_atomically
from cpr_agent.store.compaction import needed
from cpr_agent.store.reserve import Reserve

log = logging.getLogger(__name__)

_CHECKSUM_CHARS = 16
_LINE_BYTES = 1 << 20
"""A longer line is damage, and is never written. The longest are lists of what failed, of some KiB."""
_SHORTER = ((4096, 1 << 20), (256, 1000), (64, 100))
"""Characters of a text and entries of a list, tried one after the other for a record that is too long."""
GROWN_RECORDS = 4000
GROWN_BYTES = 4 << 20
"""Since the last compaction. Guests wait for the journal to be read at boot: 4000 records take 12 ms. A host with 20 guests
writes them in months. The bytes bound the few records that could be long."""
_NUMBERS = range(1 << 53)
"""Which any reader of JSON has without loss."""

_RECORD = msgspec.json.Decoder(dict[str, Any])
"""See store/schema.py, READ."""


class FileJournal:
    """Records in ``path``. A torn last line is what a crash leaves and is cut off. Damage elsewhere sets the file aside; a
    copy of what was there before the damage takes its place."""

    def __init__(self, path: Path, clock: Clock, boot: Boot) -> None:
        self._path = path
        self._clock = clock
        self._boot = boot
        self._pasts = Pasts()
        self._told: list[dict[str, Any]] = []
        self._next = 0
        self._size = self._grown_records = self._grown_bytes = 0
        self._fd = -1
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"))
        make_private_directory(path.parent)
        if path.exists():
            self._open_existing()
        else:
            self._fd = self._open(os.O_CREAT)
            sync_directory(path.parent)
        self.compact_if_grown()
        self._reserve.take()

    def append(self, event: str, **facts: object) -> Record:
        """Raises OSError; the journal is then what it was before."""
        record = _fitting({**self._stamp(), "event": event, **facts})
        line = _line_of(record)
        try:
            self._write(line)
        except OSError as error:
            if not self._reserve.gives_way_to(error):
                raise
            self._write(line)
        else:
            self._reserve.take()
        self._take(record, len(line))
        return record

    def _write(self, line: bytes) -> None:
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            error.filename = str(self._path)
            # A half would make the next record's line damage.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise

    def past(self, vm: str) -> Past:
        return self._pasts.of(vm)

    def records(self) -> list[dict[str, Any]]:
        """Without those that a compaction made, or that nobody could read."""
        return list(self._told)

    def close(self) -> None:
        os.close(self._fd)

    # -- compaction ---------------------------------------------------------------------------------------------------

    def compact_if_grown(self) -> None:
        """Blocking, some 50 ms each few thousand records: not while a guest waits for an act."""
        if self._grown_records >= GROWN_RECORDS or self._grown_bytes >= GROWN_BYTES:
            self.compact()

    def compact(self) -> None:
        """Leave out what no later decision or report needs. After a crash at any instant, or a failure, the journal is what
        it was or what it is to be, and both fold into the same."""
        self._grown_records = self._grown_bytes = 0  # a failure is not repeated at once
        try:
            self._compact()
        except OSError as error:
            log.warning("the journal could not be made smaller: %s", error)

    def _compact(self) -> None:
        with open_own(self._path) as file:
            found = list(_intact(file))
        if sum(len(line) for line, _ in found) != self._size:
            log.error(
                "the journal %s is not what was written to it; it is left for the next start of the agent", self._path
            )
            return
        kept = [found[index] for index in needed([record for _, record in found], self._pasts)]
        for facts in self._pasts.condensed():
            record = {**self._stamp(), "event": COMPACTED, **facts}
            self._next += 1
            kept.append((_line_of(record), record))
        before = self._size
        self._replace(b"".join(line for line, _ in kept))
        self._told = [record for _, record in kept if _tellable(record)]
        log.info("the journal has %d records instead of %d, %d bytes of %d", len(kept), len(found), self._size, before)

    def _replace(self, content: bytes) -> None:
        """Whatever fails, what is appended next goes to the file that has the name then; or the append fails too."""
        try:
            write_atomically(self._path, content)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._fd = self._open()
            self._size = os.fstat(self._fd).st_size

    # -- its file -----------------------------------------------------------------------------------------------------

    def _open(self, flags: int = 0) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o600)

    def _open_existing(self) -> None:
        with open_own(self._path) as file:
            for line, record in _intact(file):
                self._take(record, len(line))
            file.seek(self._size)
            file.readline(_LINE_BYTES)
            damaged = bool(file.read(1))
        if damaged:
            aside = self._path.with_name(f"{self._path.name}.damaged-{int(self._clock.now())}")
            log.error("the journal is damaged at its byte %d; it is set aside as %s", self._size, aside)
            aside.unlink(missing_ok=True)
            aside.hardlink_to(self._path)
            with open_own(self._path) as file:
                self._replace(file.read(self._size))
        else:
            self._fd = self._open()
            os.ftruncate(self._fd, self._size)

    def _take(self, record: dict[str, Any], length: int) -> None:
        """``record`` is there now, in a line of this length."""
        self._pasts.fold(record)
        self._size += length
        if record.get("event") == COMPACTED:
            self._grown_records = self._grown_bytes = 0
        else:
            self._grown_records += 1
            self._grown_bytes += length
        number = record.get("n")
        self._next = max(self._next, number if isinstance(number, int) and number in _NUMBERS else 0) + 1
        if _tellable(record):
            self._told.append(record)

    def _stamp(self) -> dict[str, Any]:
        return {"n": self._next, "at": self._clock.now(), "boot": self._boot.start_id()}


def _intact(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines and their records, up to the end or to the first line that is none of ours."""
    while line := file.readline(_LINE_BYTES):
        body = line[_CHECKSUM_CHARS + 1 : -1]
        if line != _line(body):
            return
        try:
            record = _RECORD.decode(body)
        except (ValueError, RecursionError):  # msgspec's errors, and those of UTF-8, are ValueErrors
            return
        yield line, record


def _line(body: bytes) -> bytes:
    return b"%b %b\n" % (hashlib.sha256(body).hexdigest()[:_CHECKSUM_CHARS].encode(), body)


def _line_of(record: Record) -> bytes:
    """Raises OSError."""
    line = _line(msgspec.json.encode(record))
    if len(line) > _LINE_BYTES:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return line


def _fitting(record: dict[str, Any]) -> dict[str, Any]:
    """The record; where it is too long for a line, with shorter texts and lists."""
    for characters, entries in _SHORTER:
        if len(msgspec.json.encode(record)) < _LINE_BYTES - _CHECKSUM_CHARS:
            break
        record = _shortened(record, characters, entries)
    return record


def _shortened(value: Any, characters: int, entries: int) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(one, characters, entries) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shortened(one, characters, entries) for one in value[:entries]]
    return value[:characters] if isinstance(value, str) else value


def _tellable(record: Record) -> bool:
    event, at = record.get("event"), record.get("at")
    return isinstance(event, str) and event != COMPACTED and isinstance(at, (int, float))
