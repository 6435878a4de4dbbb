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


async def connect(path: Path, *connections: tuple[object, ...]) -> int:
    """To a peer that in each connection says the first of these at once, and the others before its first answer; the last
    of all again and again. Returns how many it took."""
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        first, *early = connections[min(taken, len(connections) - 1)]
        writer.write(json.dumps(first).encode() + b"\n")
        taken += 1
        while request := await reader.read(65536):  # each is small, and waits for its answer
            for said in (*early, {"return": {}, "id": json.loads(request).get("id")}):
                writer.write(json.dumps(said).encode() + b"\n")
            early = []
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
    assert asyncio.run(connect(tmp_path / "qmp", (GREETING,))) == 1
    assert asyncio.run(connect(tmp_path / "again", (RESUME,), (GREETING,))) == 2


def test_an_event_before_the_capabilities_are_agreed_on_is_no_refusal(tmp_path: Path) -> None:
    assert asyncio.run(connect(tmp_path / "again", (GREETING, RESUME), (GREETING,))) == 2
    assert asyncio.run(connect(tmp_path / "twice", (GREETING, RESUME), (RESUME,), (GREETING, RESUME), (GREETING,))) == 4


@pytest.mark.parametrize(("said", "what"), [((RESUME,), "Greeting"), ((GREETING, RESUME), "Negotiation")])
def test_what_never_gets_to_an_answer_is_not_qmp(tmp_path: Path, said: tuple[object, ...], what: str) -> None:
    with pytest.raises(QemuFailed, match=f"no QMP on .*{what}"):
        asyncio.run(connect(tmp_path / "qmp", said))
