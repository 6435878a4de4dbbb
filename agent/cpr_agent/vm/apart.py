# SPDX-License-Identifier: GPL-2.0-or-later
"""Read a text that a caller has sent, in a process that can be ended.

60 KB can cost a parser gigabytes, for a key of many parts, or minutes, for a pattern that almost matches. A thread of the
agent could not be stopped, and guests would wait for it. So a child with limits of its own reads the text, and returns
data, or the words of an error.

    python3 -m cpr_agent.vm.apart definition|import    a request in JSON on stdin, a reply on stdout
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from cpr_agent.core.model import Definition, Imported
from cpr_agent.errors import CprError, InvalidArgument, InvalidDefinition

T = TypeVar("T")

CPU_S = 2.0
WALL_S = 10.0
"""Beside many others that want a processor."""
MEMORY_BYTES = 512 << 20
"""Of address space, most of it the interpreter's and its libraries'. The limits of depth and length come first."""
NICE = 10
_ERRORS = {kind.kind: kind for kind in (InvalidDefinition, InvalidArgument)}


class Request(msgspec.Struct, frozen=True):
    """``path`` is the definition's, which an error names."""

    text: str
    path: str = ""
    wanted: dict[str, str] = {}


class Refusal(msgspec.Struct, frozen=True):
    """An error of the parser, which the agent raises."""

    kind: str
    what: str
    vm: str = ""
    left: str = ""
    remedy: str = ""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    answer: msgspec.Raw = msgspec.Raw()
    refusal: Refusal | None = None


_REPLY = msgspec.json.Decoder(Reply)
_IMPORTED = msgspec.json.Decoder(Imported)
"""Made once: threads that have msgspec work out one type at once end in a segmentation fault (see store/schema.py)."""


def read_definition_apart(path: Path, text: str, decoder: msgspec.json.Decoder[Definition]) -> Definition:
    """Blocking. Raises InvalidDefinition."""
    try:
        return decoder.decode(_ask("definition", Request(text, str(path)), InvalidDefinition))
    except msgspec.MsgspecError as error:
        raise InvalidDefinition(f"{path} can't be read: {error}") from error


def import_apart(text: str, wanted: dict[str, str]) -> Imported:
    """Blocking. Raises InvalidArgument."""
    try:
        return _IMPORTED.decode(_ask("import", Request(text, wanted=wanted), InvalidArgument))
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"the command line can't be read: {error}") from error


def _ask(what: str, request: Request, failure: type[CprError]) -> bytes:
    """The child's answer. Raises the child's error, or ``failure`` if the child came to no end."""
    command = [sys.executable, "-m", "cpr_agent.vm.apart", what]
    source = str(Path(__file__).parents[2])
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(request),
            capture_output=True,
            timeout=WALL_S,
            check=False,
            cwd="/",
            env={"PYTHONPATH": source, "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        )
        reply = _REPLY.decode(done.stdout)
    except (subprocess.TimeoutExpired, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise failure("it takes more time or memory to read than any such text needs", left="nothing was done") from error
    if reply.refusal:
        refusal = reply.refusal
        kind = _ERRORS.get(refusal.kind, failure)
        raise kind(refusal.what, vm=refusal.vm, left=refusal.left, remedy=refusal.remedy)
    return bytes(reply.answer)


def main(arguments: list[str]) -> int:
    """Set the limits before anything else."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # SIGPROF ends the process, also within a regular expression
    with contextlib.suppress(ValueError):  # there is a lower one
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(OSError):  # the agent's unit forbids it to all that it starts (@resources)
        os.nice(NICE)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        reply = Reply(answer=msgspec.Raw(msgspec.json.encode(_read(arguments[1], request), enc_hook=_plain)))
    except CprError as error:
        reply = Reply(refusal=Refusal(error.kind, error.what, error.vm, error.left, error.remedy))
    sys.stdout.buffer.write(msgspec.json.encode(reply))
    return 0


def _plain(value: object) -> object:
    """Sizes and durations are numbers with a parser. Raises NotImplementedError for anything else."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise NotImplementedError(type(value))


def _read(what: str, request: Request) -> Definition | Imported:
    """Raises CprError."""
    if what == "definition":
        from cpr_agent.vm.definition import read_definition

        return read_definition(Path(request.path), request.text.encode())
    from cpr_agent.vm.importer import Wanted, import_command_line

    names = {name: request.wanted.get(name, "") for name in ("name", "device", "offset", "user")}
    return import_command_line(request.text, Wanted(**names))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
