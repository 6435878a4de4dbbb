"""The journal: append-only, a checksummed record a line, durable before the act that it announces (invariant 5)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from cpr_agent.core.past import Past, Pasts, Record
from cpr_agent.core.ports import Host
from cpr_agent.files import make_private_directory, rename_aside, sync_directory

_CHECKSUM_CHARS = 16


class FileJournal:
    """Records in ``path``. A torn last line is what a crash leaves and is cut off; damage elsewhere sets it aside."""

    def __init__(self, path: Path, host: Host) -> None:
        self._path = path
        self._host = host
        self._pasts = Pasts()
        make_private_directory(path.parent)
        intact, self._records, damaged = _read(path)
        for record in self._records:
            self._pasts.fold(record)
        if damaged:
            rename_aside(path, f"damaged-{int(host.now())}")
            intact = 0
        created = not path.exists()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if not damaged:
            os.ftruncate(self._fd, intact)
        if created:
            sync_directory(path.parent)

    def append(self, event: str, **facts: object) -> Record:
        record: dict[str, Any] = {
            "n": len(self._records),
            "at": self._host.now(),
            "boot": self._host.boot_id(),
            "event": event,
            **facts,
        }
        body = msgspec.json.encode(record)
        os.write(self._fd, _checksum(body) + b" " + body + b"\n")
        os.fsync(self._fd)
        self._records.append(record)
        self._pasts.fold(record)
        return record

    def past(self, vm: str) -> Past:
        return self._pasts.of(vm)

    def records(self) -> list[dict[str, Any]]:
        return list(self._records)

    def close(self) -> None:
        os.close(self._fd)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_CHECKSUM_CHARS].encode()


def _read(path: Path) -> tuple[int, list[dict[str, Any]], bool]:
    """Bytes that are intact, their records, and whether something other than the last line is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, [], False
    records: list[dict[str, Any]] = []
    intact = 0
    for line in data.splitlines(keepends=True):
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != _checksum(body):
            return intact, records, intact + len(line) < len(data)
        records.append(msgspec.json.decode(body, type=dict[str, object]))
        intact += len(line)
    return intact, records, False
