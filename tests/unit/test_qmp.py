# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU over QMP, as it comes up and as a hostile one behaves: bounded, decoded, and believed in nothing that can't be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cpr_agent.errors import QemuFailed
from cpr_agent.vm import qmp as module
from cpr_agent.vm import replies
from cpr_agent.vm.qmp import Event, SocketQmp, _believed
from cpr_agent.vm.replies import Query, UnreadableReplyError

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}, "capabilities": []}}
RESUME = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}

Said = bytes | dict[str, Any]


def raw(said: Said) -> bytes:
    return said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n"


def event(name: str, at: object = None, **data: object) -> Said:
    stamp = {"seconds": int(time.time()), "microseconds": 0} if at is None else at
    return {"event": name, "timestamp": stamp, "data": data}


@contextlib.asynccontextmanager
async def talking(path: Path, *more: Said, answer: object = None) -> AsyncIterator[SocketQmp]:
    """Connected to a peer that gives ``answer`` to every command, and before it says ``more``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = [raw(GREETING), b""]
        with contextlib.suppress(ConnectionError):
            writer.write(said.pop(0))
            while request := await reader.read(65536):  # each is small, and waits for its answer
                for message in said or map(raw, more):
                    writer.write(message)
                    await writer.drain()
                value = {} if said or answer is None else answer
                writer.write(raw({"return": value, "id": json.loads(request).get("id")}))
                said = []
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        qmp = await SocketQmp.connect("web1", path, 20.0)
        try:
            yield qmp
        finally:
            await qmp.close()


def talk(path: Path, act: Callable[[SocketQmp], Awaitable[Any]], *more: Said, answer: object = None) -> Any:
    async def both() -> Any:
        async with talking(path, *more, answer=answer) as qmp:
            return await act(qmp)

    return asyncio.run(both())


# -- as it comes up ---------------------------------------------------------------------------------------------------


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
        qmp = await SocketQmp.connect("web1", path, 20.0)
        await qmp.execute("stop")
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


@pytest.mark.parametrize(
    "greeting",
    [
        {"QMP": 5},
        {"QMP": {"version": []}},
        [1],
        "x",
        {"QMP": {"version": {}, "capabilities": 7}},
        {"id": 5},
    ],
)
def test_a_greeting_of_another_shape_is_not_qmp(tmp_path: Path, greeting: object) -> None:
    with pytest.raises(QemuFailed, match="no QMP on") as caught:
        asyncio.run(connect(tmp_path / "qmp", (greeting,)))
    assert caught.value.vm == "web1"


def test_a_peer_that_says_nothing_is_given_up_in_time(tmp_path: Path) -> None:
    async def silent() -> None:
        done = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            done.set()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            with pytest.raises(QemuFailed, match="did not greet on .* within 0.2 s"):
                await SocketQmp.connect("web1", tmp_path / "qmp", 0.2)
            await done.wait()  # and hung up on

    asyncio.run(silent())


def test_a_socket_of_another_process_is_not_its_own(tmp_path: Path) -> None:
    """A VM's user may put a link to the socket of another VM in the place of its own."""

    async def connected(path: Path, pid: int) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(raw(GREETING))
            while request := await reader.read(65536):
                writer.write(raw({"return": {}, "id": json.loads(request).get("id")}))
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", path, 20.0, pid)
            await qmp.close()

    asyncio.run(connected(tmp_path / "qmp", os.getpid()))
    (tmp_path / "link").symlink_to(tmp_path / "qmp")
    with pytest.raises(QemuFailed, match="not a socket"):
        asyncio.run(connected(tmp_path / "link", os.getpid()))
    with pytest.raises(QemuFailed, match=f"not its QEMU's: process {os.getpid()} listens there, not {os.getppid()}"):
        asyncio.run(connected(tmp_path / "qmp", os.getppid()))


# -- what it answers --------------------------------------------------------------------------------------------------

QUERIES = [value for value in vars(replies).values() if isinstance(value, Query) and value.command]
GOOD: dict[str, object] = {
    "query-version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "Debian"},
    "query-commands": [{"name": "migrate"}],
    "query-machines": [{"name": "pc-q35-10.0", "cpu-max": 255}],
    "query-qmp-schema": [{"name": "MigMode", "meta-type": "enum", "values": ["normal"]}, {"name": "x"}],
    "query-status": {"status": "running", "running": True},
    "query-cpus-fast": [{"qom-path": "/machine/unattached/device[0]"}],
    "query-cpu-model-expansion": {"model": {"name": "max", "props": {"aes": True, "vendor": "x", "level": 7}}},
    "query-tpm": [{"id": "tpm0", "model": "tpm-tis", "options": {"type": "emulator", "data": {}}}],
    "query-current-machine": {"wakeup-suspend-support": True},
    "query-pci": [{"bus": 0, "devices": [{"bus": 0, "slot": 1, "function": 0, "qdev_id": "net0"}]}],
    "qom-list": [{"name": "net0", "type": "child<virtio-net-pci>"}],
    "query-memdev": [{"id": "cpr-ram", "size": 4096, "share": True}],
    "query-named-block-nodes": [{"drv": "raw", "file": "/x", "node-name": "n", "image": {"virtual-size": 1}}],
    "query-block": [{"device": "d0", "qdev": "disk0", "removable": True, "inserted": {"iops": 100, "group": "g"}}],
    "query-block-exports": [{"id": "e0", "type": "nbd", "node-name": "n", "shutting-down": False}],
    "query-chardev": [{"label": "serial0", "filename": "null", "frontend-open": True}],
    "human-monitor-command": "hub 0\r\n",
    "x-debug-query-block-graph": {
        "nodes": [{"id": 1, "type": "block-driver", "name": "n"}],
        "edges": [{"parent": 1, "child": 2, "name": "file", "perm": [], "shared-perm": []}],
    },
    "query-hotpluggable-cpus": [
        {"type": "x86_64-cpu", "props": {"core-id": 0}, "qom-path": "/machine/unattached/device[0]"}
    ],
    "query-memory-devices": [{"type": "dimm", "data": {"id": "dimm0", "size": 4096}}],
    "query-jobs": [{"id": "job0"}],
    "query-replay": {"mode": "none"},
    "query-colo-status": {"mode": "none"},
    "query-migrate-capabilities": [{"capability": "events", "state": True}],
    "query-migrate-parameters": {"mode": "normal", "max-bandwidth": 1},
    "query-migrate": {"status": "completed", "blocked-reasons": []},
    "add-fd": {"fdset-id": 1, "fd": 7},
}
PROPERTIES = {
    "QOM_TEXT": "x",
    "QOM_TEXTS": ["x"],
    "QOM_FLAG": True,
    "QOM_NUMBER": 1,
    "QOM_SCALAR": "x",
    "QOM_LIMITS": {"iops-total": 10},
    "QOM_FEATURE_WORDS": [{"cpuid-input-eax": 1, "cpuid-register": "EDX", "features": 7}],
}


def good(query: Query[Any]) -> object:
    names = {id(value): name for name, value in vars(replies).items()}
    return PROPERTIES[names[id(query)]] if query.command == "qom-get" else GOOD[query.command]


def mutations(value: object) -> list[object]:
    """``value`` with each of its parts replaced by what QEMU would never say there, or left out."""
    wrong: list[object] = [None, [], {}, "", -1, 1.5, 1 << 64, 1 << 70, True, [[]], [{}], {"a": {}}, "x" * 5000, "\0"]
    match value:
        case dict():
            without = [{key: kept for key, kept in value.items() if key != gone} for gone in value]
            deeper = [{**value, key: changed} for key, inner in value.items() for changed in mutations(inner)]
            return [*wrong, *without, *deeper]
        case list():
            return [*wrong, *([changed] for inner in value for changed in mutations(inner))]
        case _:
            return wrong


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.command)
def test_an_answer_is_read_or_refused(query: Query[Any]) -> None:
    assert query.read(json.dumps(good(query)).encode()) is not None
    refused = 0
    for changed in mutations(good(query)):
        try:
            text = str(query.read(json.dumps(changed).encode()))
        except UnreadableReplyError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            assert text.isprintable()
            assert len(text) < 10_000
    assert refused


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'{"status": "running", "x": "\\ud800"}', "surrogate|truncated|malformed"),
        (b'{"status": NaN}', "malformed"),
        (b"[" * 100_000, "recursion|array"),
        (b'{"status": 1e999}', "out of range"),
        (b'{"status": "\xff"}', "(?i)utf-8"),
        (b'{"status": "x"', "truncated"),
    ],
)
def test_an_answer_that_is_no_json_is_refused(said: bytes, why: str) -> None:
    with pytest.raises(UnreadableReplyError, match=why):
        replies.STATUS.read(said)


def test_sizes_are_those_that_can_be_stored() -> None:
    too_large = json.dumps([{"image": {"virtual-size": 1 << 70}}]).encode()
    with pytest.raises(UnreadableReplyError, match=r"virtual-size"):
        replies.BLOCK_NODES.read(too_large)


def test_an_answer_of_another_shape_names_its_command_and_its_vm(tmp_path: Path) -> None:
    with pytest.raises(QemuFailed, match="an answer to query-status that makes no sense") as caught:
        talk(tmp_path / "qmp", lambda qmp: qmp.ask(replies.STATUS), answer=[1])
    assert caught.value.vm == "web1"


def test_of_two_answers_the_first_counts(tmp_path: Path) -> None:
    """QEMU answers a batch; the id of its first question comes twice before the others."""

    async def act() -> list[Any]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(raw(GREETING))
            writer.write(raw({"return": {}, "id": json.loads(await reader.read(65536)).get("id")}))
            first, second = [json.loads(await reader.readline())["id"] for _ in range(2)]
            for id_, status in ((first, "running"), (first, "paused"), (second, "debug")):
                writer.write(raw({"return": {"status": status}, "id": id_}))
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", tmp_path / "qmp", 20.0)
            answers = await qmp.ask_all([(replies.STATUS, {}), (replies.STATUS, {})])
            await qmp.close()
            return [answer.status for answer in answers]

    assert asyncio.run(act()) == ["running", "debug"]


def test_what_cannot_be_sent_leaves_nothing_behind(tmp_path: Path) -> None:
    async def act(qmp: SocketQmp) -> object:
        with pytest.raises(UnicodeEncodeError):
            await qmp.execute("qom-get", {"path": "\ud800"})
        return await qmp.ask(replies.STATUS)

    assert talk(tmp_path / "qmp", act, answer={"status": "running"}) == replies.Status("running")


def test_no_question_needs_no_qemu(tmp_path: Path) -> None:
    async def act(qmp: SocketQmp) -> list[Any]:
        await qmp.close()
        return await qmp.ask_all([])

    assert talk(tmp_path / "qmp", act) == []


def test_a_message_that_cannot_be_read_ends_that_connection(tmp_path: Path) -> None:
    for number, said in enumerate((b"nonsense\n", b"[" * 100_000 + b"\n", b'{"id": 7}\n', b'{"error": 5}\n')):
        with pytest.raises(QemuFailed, match="connection to QEMU was lost during query-status"):
            talk(tmp_path / str(number), lambda qmp: qmp.ask(replies.STATUS), said)


def test_a_message_without_end_is_bounded(tmp_path: Path) -> None:
    endless = b"x" * (8 << 20)
    with pytest.raises(QemuFailed, match="connection to QEMU was lost during query-status"):
        talk(tmp_path / "qmp", lambda qmp: qmp.ask(replies.STATUS), endless)


def test_an_answer_that_nobody_waits_for_any_more_ends_no_connection(tmp_path: Path) -> None:
    """Its caller was cancelled: the undo of what that wanted needs the connection."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw(GREETING))
        while request := await reader.read(65536):  # each is small, and waits for its answer
            command = json.loads(request)
            if command["execute"] == "query-block":
                asked.set()
                await go.wait()
                writer.write(raw({"return": {}}))  # to qmp_capabilities of a client before, for which QEMU was too late
                writer.write(raw({"error": {"class": "CommandNotFound", "desc": "negotiated already"}}))
            answer = {"status": "running"} if command["execute"] == "query-status" else []
            writer.write(raw({"return": answer, "id": command.get("id")}))
        writer.close()

    async def story() -> None:
        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", tmp_path / "qmp", 20.0)
            cancelled = asyncio.ensure_future(qmp.execute("query-block"))
            await asked.wait()
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            go.set()
            for _ in range(2):
                assert (await qmp.ask(replies.STATUS)).status == "running"
            assert not qmp.gone
            await qmp.close()

    asyncio.run(story())


def test_the_wait_for_ones_turn_counts(tmp_path: Path) -> None:
    """Commands go one at a time: behind one that is not answered, others must not wait longer than they may."""

    async def act() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(raw(GREETING))
            await reader.read(65536)
            writer.write(raw({"return": {}}))
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", tmp_path / "qmp", 20.0)
            first = asyncio.create_task(qmp.execute("stop", timeout_s=20.0))
            await asyncio.sleep(0)
            with pytest.raises(QemuFailed, match="did not answer query-status within 0.1 s"):
                await qmp.ask(replies.STATUS, timeout_s=0.1)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await qmp.close()

    asyncio.run(act())


def test_a_command_after_the_end_of_the_connection_fails_at_once(tmp_path: Path) -> None:
    """A guest may stand still while an undo looks whether its QEMU is there."""

    async def act() -> None:
        hang_up, gone = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(raw(GREETING))
            await reader.read(65536)
            writer.write(raw({"return": {}}))
            await hang_up.wait()
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", tmp_path / "qmp", 20.0)
            qmp.on_event(lambda name: gone.set() if name == module.GONE else None)
            hang_up.set()
            await gone.wait()
            for _ in range(2):  # the first may find the connection as it ends
                with pytest.raises(QemuFailed, match="the connection to QEMU was lost during query-status"):
                    await qmp.ask(replies.STATUS, timeout_s=1.0)
            await qmp.close()

    asyncio.run(act())


def test_a_peer_that_reads_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection would go on to be read, and each connection after it, too."""
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.1)

    async def act() -> None:
        hung_up = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(raw(GREETING))
            await reader.read(65536)
            writer.write(raw({"return": {}}))
            reader._transport.pause_reading()  # type: ignore[attr-defined]  # asyncio has no other way
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(raw(event("X")))
                    await writer.drain()
            hung_up.set()

        async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
            qmp = await SocketQmp.connect("web1", tmp_path / "qmp", 20.0)
            with pytest.raises(QemuFailed, match="did not answer stop"):
                await qmp.execute("stop", {"much": "x" * (4 << 20)}, timeout_s=0.1)
            await qmp.close()
            async with asyncio.timeout(20):
                await hung_up.wait()

    asyncio.run(act())


# -- what it tells of ---------------------------------------------------------------------------------------------------


def heard(path: Path, *said: Said) -> Event:
    """The STOP that comes with these before the answer to a command."""

    async def act(qmp: SocketQmp) -> Event:
        with qmp.expecting("STOP") as stopped:
            await qmp.execute("stop")
            return await stopped

    event: Event = talk(path, act, *said)
    return event


def test_an_event_has_the_time_that_qemu_says() -> None:
    at = time.time() - 30.0
    assert _believed(Event("STOP", at, ""), time.monotonic() - 60.0) == Event("STOP", at, "")


@pytest.mark.parametrize("off_s", [-2, 4])
def test_an_event_was_not_before_the_wait_for_it_nor_later_than_now(tmp_path: Path, off_s: int) -> None:
    """A pause would be seconds too long, or less than nothing."""
    before = time.time()
    told = {"seconds": int(before) + off_s, "microseconds": 0}
    found = heard(tmp_path / "qmp", event("RESUME"), event("STOP", told))
    assert before <= found.at <= time.time()


@pytest.mark.parametrize(
    ("stamp", "why"),
    [
        ({"seconds": 0, "microseconds": 0}, "STOP was -[0-9]+ s from now, which can't be"),
        ({"seconds": 1 << 39, "microseconds": 0}, r"STOP was \+[0-9]+ s from now, which can't be"),
        ({"seconds": -1, "microseconds": -1}, "can't be"),
        ({"seconds": 1e300, "microseconds": 0}, "told of STOP in a way that makes no sense"),
        ({"seconds": 1 << 70, "microseconds": 0}, "makes no sense"),
        ({"seconds": 1}, "makes no sense"),
        (5, "makes no sense"),
    ],
)
def test_an_event_of_a_time_that_cannot_be_is_qemus_failure(tmp_path: Path, stamp: object, why: str) -> None:
    with pytest.raises(QemuFailed, match=why) as caught:
        heard(tmp_path / "qmp", event("STOP", stamp))
    assert caught.value.vm == "web1"


def test_the_end_of_a_migration_is_told_with_its_status(tmp_path: Path) -> None:
    async def act(qmp: SocketQmp) -> str:
        with qmp.expecting("MIGRATION", lambda event: event.status == "completed") as ended:
            await qmp.execute("migrate")
            return (await ended).status

    said = (event("MIGRATION", status="active"), event("MIGRATION", status="completed"))
    assert talk(tmp_path / "qmp", act, *said) == "completed"
    with pytest.raises(QemuFailed, match="MIGRATION in a way that makes no sense"):
        talk(tmp_path / "again", act, event("MIGRATION", status=7))


def test_events_in_a_loop_are_told_now_and_then_and_kept_by_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them costs core a look at the VM; pvpanic's, which a guest may cause in a loop, costs it nothing."""
    monkeypatch.setattr(module, "REPEAT_S", 0.01)
    told: list[str] = []

    async def act(qmp: SocketQmp) -> int:
        again = asyncio.Event()

        def sink(name: str) -> None:
            told.append(name)
            if told.count("STOP") == 2:
                again.set()

        qmp.on_event(sink)
        await qmp.execute("stop")
        await again.wait()
        return qmp.dropped

    flood = raw(event("GUEST_CRASHLOADED")) * 20_000 + raw(event("STOP")) * 20_000
    assert talk(tmp_path / "qmp", act, flood) == 20_000
    assert told.count("STOP") < 200
    assert "GUEST_CRASHLOADED" not in told


def test_devices_that_have_gone_are_counted_before_the_next_answer(tmp_path: Path) -> None:
    async def act(qmp: SocketQmp) -> tuple[int | None, int]:
        await qmp.execute("stop")
        return qmp.unplugged, qmp.dropped

    assert talk(tmp_path / "qmp", act, *[event("DEVICE_DELETED"), event("GUEST_CRASHLOADED")] * 2) == (2, 4)


def test_others_get_their_turn_while_one_floods(tmp_path: Path) -> None:
    """By turns of the loop, not by time: between the flood's first message and its end others had many."""

    async def act(qmp: SocketQmp) -> int:
        turns = 0
        done = asyncio.create_task(qmp.execute("stop"))
        while not done.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert talk(tmp_path / "qmp", act, raw(event("X")) * 10_000) > 10_000 / module.MESSAGES_PER_TURN
