# SPDX-License-Identifier: GPL-2.0-or-later
"""dbus-fast where it is installed, dbus-next elsewhere (ADR 28): who chooses, by what, and that nobody else has to know."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source import parsed
from tests.unit.test_architecture import AGENT, imports

ROOT = AGENT.parent.parent
WITHOUT_FAST = ROOT / "tests/bus/without_fast"
LIBRARY = "bus/library.py"


def run(program: str, *before: Path) -> str:
    """What ``program`` prints where ``before`` come first on the module path."""
    path = os.pathsep.join(map(str, (*before, ROOT / "agent", ROOT)))
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


def test_one_module_imports_either_library() -> None:
    importers = {one.file for one in imports(AGENT) if one.target in ("dbus_fast", "dbus_next")}
    assert importers == {LIBRARY}


def private_of_others(path: Path) -> Iterator[str]:
    """Private names that the module uses of what it does not define."""
    tree = parsed(path)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    own = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    yield from (one.attr for one in attributes if one.attr not in own and not one.attr.endswith("__"))


def test_one_module_touches_what_is_private_in_the_library() -> None:
    found = {path.name: set(private_of_others(path)) for path in (AGENT / "bus").glob("*.py")}
    assert {name: names for name, names in found.items() if names} == {"library.py": {"_marshall"}}


NAME = "from cpr_agent.bus.library import name; import sys; print(name(), 'gi' in sys.modules)"


def fast_of_version(directory: Path, version: str) -> Path:
    (directory / "dbus_fast").mkdir()
    (directory / "dbus_fast/__init__.py").touch()
    (directory / "dbus_fast/__version__.py").write_text(f"__version__ = {version!r}\n")
    return directory


def test_the_fast_one_is_used_where_it_is_installed_and_the_other_elsewhere() -> None:
    assert run(NAME) == "dbus_fast False"
    assert run(NAME, WITHOUT_FAST) == "dbus_next False"


def test_one_that_is_too_old_is_left_alone(tmp_path: Path) -> None:
    """Debian 12's."""
    assert run(NAME, fast_of_version(tmp_path, "1.84.2")) == "dbus_next False"


SAME = r"""
import json, random, sys
from cpr_agent.bus.client import plain
from cpr_agent.bus.library import Message, MessageFlag, Variant, marshal, name
from cpr_agent.bus.frames import lacks_arguments, parse, parse_header, read_arguments

def told(frame):
    message = parse(bytearray(frame))
    late = parse_header(bytearray(frame))
    assert (message is None) == (late is None)
    if late and not lacks_arguments(message):
        assert lacks_arguments(late) == bool(message.signature)
        assert plain(read_arguments(late).body) == plain(message.body)
    if message is None:
        return None
    kind = [message.path, message.interface, message.member, message.message_type.value, message.flags.value]
    return kind + [message.serial, "unread" if lacks_arguments(message) else [message.signature, plain(message.body)]]

options = {"a": Variant("s", "größer"), "b": Variant("as", ["x", "y"]), "c": Variant("v", Variant("t", 2**63)),
    "d": Variant("a(sd)", [["p", 1.5]]), "e": Variant("a{sv}", {"n": Variant("x", -1)}), "f": Variant("b", True)}
calls = [
    Message("a.b", "/a", "a.b", "None", serial=1),
    Message("a.b", "/a", "a.b", "Options", signature="ssa{sv}", body=["x", "", options], serial=2),
    Message("a.b", "/a", "a.b", "Other", signature="yqnuixtdgov", serial=3, flags=MessageFlag.NO_REPLY_EXPECTED,
        body=[255, 65535, -1, 2**32 - 1, -1, -2**63, 2**64 - 1, 0.5, "a{sv}", "/x", Variant("(ib)", [7, False])]),
]
frames = [bytes(marshal(call)) for call in calls]
chance, cut = random.Random(28), []
for frame in frames * 200:
    at = max(16, len(frame) - chance.randrange(1, 90))
    cut.append(frame[:at] + bytes([chance.randrange(256)]) + frame[at + 1:])
print(json.dumps([[frame.hex() for frame in frames], [told(frame) for frame in frames]]))
for frame in cut:
    told(frame)
"""


def test_both_write_the_same_bytes_and_read_the_same_values() -> None:
    """And neither ends at what is broken."""
    fast, other = json.loads(run(SAME)), json.loads(run(SAME, WITHOUT_FAST))
    assert fast == other
    assert [one[-1][0] for one in fast[1]] == ["", "ssa{sv}", "yqnuixtdgov"]


FRAMES = r"""
import struct
from cpr_agent.bus.library import Message, Variant, marshal
from cpr_agent.bus.frames import lacks_arguments, parse

def framed(signature, body):
    texts = "s" * len(signature)
    plain_ = marshal(Message("a.b", "/a", "a.b", "M", signature=texts, body=["x"] * len(texts), serial=1))
    header_bytes = 16 + struct.unpack_from("<I", plain_, 12)[0]
    field = b"\1g\0%c%s\0"  # of the signature
    head = plain_[: header_bytes + -header_bytes % 8]
    head = head.replace(field % (len(texts), texts.encode()), field % (len(texts), signature.encode()))
    struct.pack_into("<I", head, 4, len(body))
    return head + body

"""
TOO_LONG = [
    ("s", [0xFFFFFFFF]),
    ("s", [0xFFFFFFF0]),
    ("s", [64]),
    ("as", [0x40, 0xFFFFFFFB, 0xFFFFFFFB]),
    ("as", [0xFFFFFFF0, 1, 2]),
    ("ay", [0xFFFFFFF0]),
    ("ay", [65]),
    ("as", [6, 1, 0]),
    ("a()", [8, 0]),
    ("()", []),
    ("a{sv}", [12, 0, 1]),
    ("u", []),
    ("us", [1]),
    ("(uu", [1, 2]),
    ("a", [0]),
    ("z", [0]),
    ("v", [0x7A01]),
    ("v", [0x757502, 0]),
]


@pytest.mark.parametrize("before", [(), (WITHOUT_FAST,)], ids=["fast", "next"])
def test_lengths_and_types_that_do_not_fit_are_seen_before_the_library_reads_them(before: tuple[Path, ...]) -> None:
    """In a process of its own: to some of them dbus-fast finds no end."""
    bodies = [(signature, struct.pack(f"<{len(words)}I", *words)) for signature, words in TOO_LONG]
    program = f"print(*((message := parse(framed(*one))) is None or lacks_arguments(message) for one in {bodies}))"
    assert set(run(FRAMES + program, *before).split()) == {"True"}
    fits = [("s", b"\1\0\0\0x\0"), ("as", b"\0\0\0\0"), ("ay", b"\1\0\0\0z"), ("v", b"\1y\0\5"), ("(yy)", b"\1\2")]
    program = f"print(*(lacks_arguments(parse(framed(*one))) for one in {fits}))"
    assert set(run(FRAMES + program, *before).split()) == {"False"}


MANY = r"""
from cpr_agent.bus.frames import lacks_arguments, parse, parse_header, read_arguments, signature_of
from cpr_agent.bus.library import Message, Variant, marshal

def frame(count):
    values = [Variant("y", 1)] * count
    return marshal(Message("a.b", "/a", "a.b", "M", signature="av", body=[values], serial=1))

def found(call):
    return signature_of(call), lacks_arguments(call)

print(lacks_arguments(parse(frame(5000))), *found(parse_header(frame(20_000))))
for count in (100, 5000, 20_000):
    print(*found(read_arguments(parse_header(frame(count)))))
"""


@pytest.mark.parametrize("before", [(), (WITHOUT_FAST,)], ids=["fast", "next"])
def test_arguments_of_a_call_are_read_late_and_have_few_values(before: tuple[Path, ...]) -> None:
    """An answer's may be many."""
    assert run(MANY, *before).splitlines() == ["False av True", "av False", "av True", "av True"]


DEEP = r"""
import struct
from cpr_agent.bus.library import Message, Variant, marshal
from cpr_agent.bus.frames import MAX_BODY_BYTES, lacks_arguments, parse

def nested(levels):
    frame = marshal(Message("a.b", "/a", "a.b", "M", signature="v", body=[Variant("s", "x")], serial=1))
    body = b"\1v\0" * levels + b"\1y\0\5"
    head = frame[: len(frame) - struct.unpack_from("<I", frame, 4)[0]]
    struct.pack_into("<I", head, 4, len(body))
    return parse(head + body)

print(*(lacks_arguments(nested(levels)) for levels in (10, 60, 70, 500, (MAX_BODY_BYTES - 4) // 3)))
"""


@pytest.mark.parametrize("before", [(), (WITHOUT_FAST,)], ids=["fast", "next"])
def test_values_in_values_are_bounded(before: tuple[Path, ...]) -> None:
    """dbus-fast 2.44 has no bound for them, and takes some 300 bytes of stack for each."""
    assert run(DEEP, *before) == "False False True True True"
