"""What a QEMU may do while one connects to it, and a real one does only now and then."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cpr_agent.errors import QemuFailed
from cpr_agent.vm.qmp import Qmp

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}, "capabilities": []}}
RESUME = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}


async def connect(path: Path, *firsts: object) -> int:
    """To a peer that says these first, one in each connection; returns how many it took."""
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        writer.write(json.dumps(firsts[min(taken, len(firsts) - 1)]).encode() + b"\n")
        taken += 1
        while request := await reader.read(65536):  # each is small, and waits for its answer
            writer.write(json.dumps({"return": {}, "id": json.loads(request).get("id")}).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        qmp = await Qmp.connect("web1", path, 20.0)
        assert await qmp.execute("query-status") == {}
        await qmp.close()
    finally:
        server.close()
    return taken


def test_an_event_before_the_greeting_is_no_greeting(tmp_path: Path) -> None:
    assert asyncio.run(connect(tmp_path / "qmp", GREETING)) == 1
    assert asyncio.run(connect(tmp_path / "again", RESUME, GREETING)) == 2


def test_what_never_greets_is_not_qmp(tmp_path: Path) -> None:
    with pytest.raises(QemuFailed, match="no QMP on .*Greeting"):
        asyncio.run(connect(tmp_path / "qmp", RESUME))
