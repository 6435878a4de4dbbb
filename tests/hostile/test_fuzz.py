# SPDX-License-Identifier: GPL-2.0-or-later
"""Nonsense by chance, with its seed printed: only documented errors come of it.

CPR_TEST_FUZZ_S is how long each campaign takes (s), CPR_TEST_SEED where it begins.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from cpr_agent.bus.client import CallError
from cpr_agent.bus.contract import read_contract, standard_interfaces
from cpr_agent.bus.frames import parse
from cpr_agent.bus.library import Message, MessageFlag, SignatureTree, SignatureType, Variant, marshal
from cpr_agent.bus.wire import ClientBus
from cpr_agent.core.listener import Listener
from cpr_agent.core.settings import Settings
from cpr_agent.core.upgrade.ledger import Ledger
from cpr_agent.errors import CprError
from cpr_agent.store import vmstate
from cpr_agent.store.checkpoints import CheckpointStore
from cpr_agent.store.journal import FileJournal, _line, _line_of
from cpr_agent.store.schema import read_launch, read_manifest
from cpr_agent.vm import replies
from cpr_agent.vm.definition import decode_toml, read_definition
from cpr_agent.vm.importer import import_command_line
from cpr_agent.vm.replies import Query, UnreadableReplyError
from tests.fakes import FakeHost
from tests.hostile.conftest import Evil, assert_contained
from tests.hostile.tally import note_fuzz
from tests.hostile.test_qemus import DOCUMENTED
from tests.journals import many_upgrades
from tests.lab import Guest, Lab
from tests.samples import launch, manifest

pytestmark = pytest.mark.fuzz

FUZZ_S = float(os.environ.get("CPR_TEST_FUZZ_S", "10"))
SEED = int(os.environ.get("CPR_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
PIECES = (
    b"null",
    b"[]",
    b"{}",
    b"-1",
    b"1e999",
    b"9" * 30,
    b'"\\ud800"',
    b'"\\u0000"',
    b"true",
    b"\xff" * 4,
    b"\0",
    b"NaN",
)


def mutated(chance: random.Random, seed: bytes) -> bytes:
    out = bytearray(seed)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(5):
            case 0:
                del out[at : at + chance.randint(1, 40)]
            case 1:
                out[at:at] = chance.randbytes(chance.randint(1, 9))
            case 2:
                out[at:at] = out[chance.randrange(len(out) + 1) :][: chance.randint(1, 60)]
            case 3:
                out[at : at + chance.randint(0, 12)] = chance.choice(PIECES)
            case _:
                out = out[: max(1, at)] if chance.random() < 0.2 else out
    return bytes(out)


class Campaign:
    """Runs inputs until its time is over, and counts what no document mentions."""

    def __init__(self) -> None:
        print(f"CPR_TEST_SEED={SEED}")
        self.chance = random.Random(SEED)
        self.inputs = 0
        self.surprises: Counter[str] = Counter()
        self._end = time.monotonic() + FUZZ_S

    def goes_on(self) -> bool:
        return time.monotonic() < self._end

    def surprise(self, what: str) -> None:
        self.surprises[what] += 1

    def close(self) -> None:
        note_fuzz(self.inputs, self.surprises.total())
        assert self.inputs
        assert not self.surprises, f"seed {SEED}: {self.surprises.most_common(10)}"


ANSWERS = (
    b'{"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "Debian"}',
    b'[{"name": "migrate", "values": ["cpr-transfer"], "type": "child<x>", "capability": "events", "state": true}]',
    b'{"status": "completed", "blocked-reasons": ["x"], "error-desc": "y", "mode": "none", "fdset-id": 1}',
    b'[{"qom-path": "/machine", "id": "x", "model": "y", "options": {"type": "z"}, "size": 1, "share": true}]',
    b'[{"devices": [{"bus": 0, "slot": 1, "function": 0, "qdev_id": "x", "pci_bridge": {"devices": []}}]}]',
    b'[{"drv": "raw", "file": "/x", "node-name": "n", "image": {"virtual-size": 1}}]',
    b'{"model": {"props": {"aes": true}}, "seconds": 1, "microseconds": 2, "wakeup-suspend-support": true}',
    b'{"id": "1", "event": "STOP", "timestamp": {}, "data": {}, "error": {"class": "x", "desc": "y"}, "return": 1}',
)
QUERIES = [value for value in vars(replies).values() if isinstance(value, Query)]
DEFINITION = (Path(__file__).parent.parent.parent / "agent/cpr_agent/cli/example-vm.toml").read_bytes()
COMMAND_LINE = (
    b'qemu-system-x86_64 -name guest=web,debug-threads=on -m 4096 -object \'{"qom-type":"memory-backend-file","id":"r"}\' '
    b"-machine q35,memory-backend=r -netdev tap,fd=3,id=n -chardev socket,id=c,fd=3,server=on -drive file=/x,,y,if=ide -S"
)


STATE = (
    b"QEVM" + (3).to_bytes(4, "big") + b"\x07" + (11).to_bytes(4, "big") + b"pc-q35-10.0" + bytes(2000)
    + b"\x06" + (35).to_bytes(4, "big") + b'{"devices":[{"name":"cpu_common"}]}'
)  # fmt: skip
HOST = FakeHost()
JOURNAL = b"".join(_line_of(record) for record in many_upgrades(1))
UNREADABLE = (msgspec.MsgspecError, KeyError, ValueError)
"""What store and runner take for a record that can't be read."""


class Parser(NamedTuple):
    seeds: tuple[bytes, ...]
    read: Callable[[bytes, random.Random], object]
    documented: tuple[type[Exception], ...]


def read_state(raw: bytes, _: random.Random) -> object:
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        return vmstate.inspect(file.fileno(), "state", "web1")


def read_journal(raw: bytes, chance: random.Random) -> object:
    """Half of the time with the right checksums: another agent's records, or a downgrade's."""
    body = b"".join(_line(line.partition(b" ")[2]) for line in raw.splitlines()) if chance.random() < 0.5 else raw
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        path.write_bytes(body)
        journal = FileJournal(path, HOST, HOST)
        try:
            Ledger(journal, HOST, Listener())
            return journal.append("woken", vm="web1")
        finally:
            journal.close()


def read_file_of(name: str) -> Callable[[bytes, random.Random], object]:
    """As the store reads it from a VM's directory."""

    def read(raw: bytes, _: random.Random) -> object:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "web1" / name
            path.parent.mkdir()
            path.write_bytes(raw)
            store = CheckpointStore(Path(directory), ())
            return store.live("web1") if name == "manifest.json" else store.held("web1")

    return read


CALL = Message(
    "org.cpragent1", "/org/cpragent1", "org.cpragent1.Manager", "Import", signature="sa{sv}", serial=7, body=["x", {}]
)
FRAME = bytes(marshal(CALL))
HELD = b'{"reason":"x","error":"y","at":1.0,"evidence":[["a","b","c"]]}'
SETTINGS = (Path(__file__).parent.parent.parent / "packaging/agent.toml").read_bytes().replace(b"\n# ", b"\n")
PARSERS: dict[str, Parser] = {
    "frames": Parser((FRAME,), lambda raw, _: parse(bytearray(FRAME[:16] + raw[16:])), ()),
    "holds": Parser((HELD,), read_file_of("held"), ()),
    "checkpoints": Parser((msgspec.json.encode(manifest()),), read_file_of("manifest.json"), (CprError,)),
    "settings": Parser((SETTINGS,), lambda raw, _: decode_toml(Path("/etc/x.toml"), Settings, raw), (CprError,)),
    "answers": Parser(ANSWERS, lambda raw, chance: chance.choice(QUERIES).read(raw), (UnreadableReplyError,)),
    "definitions": Parser((DEFINITION,), lambda raw, _: read_definition(Path("/etc/web1.toml"), raw), (CprError,)),
    "command lines": Parser((COMMAND_LINE,), lambda raw, _: import_command_line(raw.decode(errors="replace")), (CprError,)),
    "states": Parser((STATE,), read_state, (CprError, OSError)),
    "manifests": Parser((msgspec.json.encode(manifest()),), lambda raw, _: read_manifest(raw), UNREADABLE),
    "launch records": Parser((msgspec.json.encode(launch()),), lambda raw, _: read_launch(raw), UNREADABLE),
    "journals": Parser((JOURNAL,), read_journal, ()),
}


@pytest.fixture
def unlogged() -> Iterator[None]:
    """pytest keeps each record, and after millions of them one collection of garbage takes seconds."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_raises_documented_errors_alone(name: str) -> None:
    parser, campaign = PARSERS[name], Campaign()
    while campaign.goes_on():
        raw = mutated(campaign.chance, campaign.chance.choice(parser.seeds))
        campaign.inputs += 1
        began = time.process_time()
        try:
            parser.read(raw, campaign.chance)
        except parser.documented:
            pass
        except Exception as error:
            campaign.surprise(f"{type(error).__name__}: {error} of {raw[:200]!r}")
        if time.process_time() - began > 2:
            campaign.surprise(f"slow: {raw[:200]!r}")
    campaign.close()


def test_a_qemu_that_answers_nonsense(lab: Lab, evil: Evil, good: Guest) -> None:
    liar, campaign = evil(), Campaign()
    liar.lie({"on": "*", "mutate": 0.03, "seed": SEED})
    acts: dict[str, Callable[[], Any]] = {
        "save": liar.guest.save,
        "load": liar.guest.load,
        "refresh": lambda: liar.guest.call("Refresh", "a{sv}", {}),
        "check": lambda: liar.guest.call("Check"),
        "properties": lambda: liar.guest.properties,
        "start": liar.guest.start,
        "resume": lambda: liar.guest.call("Resume"),
        "save all": lambda: lab.job("SaveAll", survives="qemu-restart", policy="force"),
        "load all": lambda: lab.job("LoadAll"),
    }
    while campaign.goes_on():
        name = campaign.chance.choice(list(acts))
        campaign.inputs += 1
        try:
            found = acts[name]()
        except CallError as error:
            if error.kind not in DOCUMENTED:
                campaign.surprise(f"{name}: {error.kind}: {error}")
        else:
            if isinstance(found, str) and "internal" in found:
                campaign.surprise(f"{name}: {found}")
    if good.state == "saved":
        good.load()
    assert_contained(lab, good)
    campaign.close()


WORDS = (
    *(
        "",
        "web1",
        "good",
        "/",
        "..",
        "a" * 300,
        "\u202e\x1b[2J",
        "org.cpragent1.VM",
        "html",
        "kexec",
        "4G",
        "-1",
        "9" * 5000,
    ),
    *("uuid:x", "/boot/vmlinuz", "\U0001f600", "kvm/", "a=inf", "{}", "a=" + "[" * 3000, "qemu -m 1 -S"),
)
OPTIONS = (
    *("survives", "policy", "before-kexec", "wait", "autostart", "in-turn", "dry-run", "max-pause", "back", "drill"),
    *("size", "device", "name", "offset", "user", "x"),
)
PATHS = ("/org/cpragent1", "/org/cpragent1/vm/good", "/org/cpragent1/job/1", "/org/freedesktop/LogControl1", "/", "/org/x")
HARMFUL = ("Upgrade", "Stop", "Discard", "Rollback", "CprSave", "SaveAll", "RefreshAll", "Refresh")
"""As root these do what they say."""


def value(chance: random.Random, kind: SignatureType) -> Any:
    match kind.token:  # of a signature
        case "s":
            return chance.choice(WORDS)
        case "g":
            return "a{sv}"
        case "o":
            return chance.choice(PATHS)
        case "b":
            return chance.random() < 0.5
        case "d":
            return chance.choice([0.0, -1.5, float("nan"), float("inf"), 1e308])
        case "v":
            signature = chance.choice(["s", "b", "d", "u", "as", "a{sv}", "v", "(ss)"])
            return Variant(signature, value(chance, SignatureTree(signature).types[0]))
        case "(":
            return [value(chance, child) for child in kind.children]
        case "a" if kind.children[0].token == "{":  # noqa: S105 - of a signature
            inner = kind.children[0].children[1]
            return {chance.choice(OPTIONS): value(chance, inner) for _ in range(chance.randint(0, 4))}
        case "a":
            return [value(chance, kind.children[0]) for _ in range(chance.randint(0, 4))]
        case _:
            return chance.choice([0, 1, 7])


def random_call(chance: random.Random) -> Message:
    interface = chance.choice([one for one in (*read_contract().values(), *standard_interfaces().values()) if one.methods])
    method = chance.choice([one for one in interface.methods.values() if one.name not in HARMFUL] or [None])
    if method is None:
        return random_call(chance)
    signature = method.in_signature if chance.random() < 0.8 else chance.choice(["", "s", "as", "a{sv}", "v", "(ii)", "d"])
    body = [value(chance, kind) for kind in SignatureTree(signature).types]
    path, flags = chance.choice(PATHS), MessageFlag(chance.choice([0, 0, 0, 4]))
    return Message("org.cpragent1", path, interface.name, method.name, signature=signature, body=body, flags=flags)


def test_calls_of_any_shape(lab: Lab, good: Guest) -> None:
    campaign = Campaign()

    async def call_on() -> None:
        bus = await ClientBus(lab.address).connect()
        while campaign.goes_on():
            message = random_call(campaign.chance)
            campaign.inputs += 1
            async with asyncio.timeout(60):
                reply = await bus.call(message)
            if reply and reply.error_name and reply.error_name.endswith(".Internal"):
                campaign.surprise(f"{message.path} {message.member} {str(message.body)[:200]}")
        bus.disconnect()

    asyncio.run(call_on())
    if good.state == "saved":
        good.load()
    assert_contained(lab, good)
    campaign.close()
