# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that libvirt's hook becomes for an adopted domain: ask the agent, and pass its answer on.

    python3 -I -S ask.py DOMAIN OPERATION SUB-OPERATION EXTRA <XML

libvirt waits for it, and has no time limit of its own (https://libvirt.org/hooks.html): each wait here has one. Whatever is
not a plain yes is a no, for which libvirt shows what stands on stderr. It must not call libvirt, which waits for it.

A domain's start waits for it, so that it imports what is built into Python alone, as vm/launch.py does.
"""
# Nor contextlib:
# ruff: noqa: SIM105

from __future__ import annotations

import _socket
import os
import sys
import time

SOCKET = "/run/cpr-agent/hook.sock"
CONNECT_S = 10.0
SILENCE_S = 20.0
"""An agent that lives says so several times in it."""
ANSWER_S = {"prepare": 600.0, "started": 120.0}
"""So long is an answer to this operation waited for. A load proves its guest's memory in ``prepare``."""
HELD_S = 300.0
"""The same once the agent acts on its yes: an agent that hangs then is killed (WatchdogSec=), and comes back."""
SHORTEST_S = 0.01
RETURN_S = 90.0
"""So long an agent that was asked and then killed may take to come back (TimeoutStartSec= of its unit, and a restart)."""
ABSENT_S = {"prepare": 10.0, "started": RETURN_S}
"""So long it may take to be there at all: a restart takes some seconds while a small host boots. In ``started`` it was
there a moment ago."""
LOOK_S = 0.1
"""Between two attempts to reach it then; nothing tells a program without libraries that a socket is there."""
ALIVE, HELD, YES, NO = b".", b"!", b"+", b"-"
"""What the agent says, a byte each: it is at work; it acts on its yes from here on; yes; no, and why."""
MAX_BYTES = 5 << 20
"""Of a request. libvirt takes no XML above 4 MiB (VIR_NET_MESSAGE_STRING_MAX in its src/rpc/virnetprotocol.x)."""
LENGTH_BYTES = 4
CREDENTIALS_BYTES = 12
MAX_REASON_BYTES = 8192


class RefusedError(Exception):
    """Why the domain may not go on."""


class LostError(Exception):
    """The agent has hung up without an answer."""


def main(arguments: list[str], path: str = SOCKET) -> int:
    domain, operation, sub_operation = arguments[1:4]
    try:
        request = message(operation, sub_operation, os.fsencode(domain), sys.stdin.buffer.read())
        ask(path, request, time.monotonic() + ANSWER_S[operation], ABSENT_S[operation])
    except (RefusedError, OSError) as error:
        print(f"cpr-agent: {error}", file=sys.stderr)  # noqa: T201 - libvirt shows it
        return 1
    return 0


def message(operation: str, sub_operation: str, domain: bytes, xml: bytes) -> bytes:
    """Raises RefusedError if it is too long."""
    body = b"\0".join((operation.encode(), sub_operation.encode(), domain, xml))
    if len(body) > MAX_BYTES:
        raise RefusedError(f"the domain's XML has {len(xml)} bytes, and the agent reads {MAX_BYTES} at most")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def ask(path: str, request: bytes, deadline: float, absent_s: float) -> None:
    """Return if the agent says yes. Raises RefusedError, OSError.

    An agent that is killed meanwhile is asked again once it is back. It may have acted on its yes already: a no would end
    the domain's QEMU, and with it a guest that is in no checkpoint any more.
    """
    agent = reached(path, time.monotonic() + absent_s)
    while True:
        try:
            return until_answered(agent, request, deadline)
        except LostError:
            agent.close()
            agent = reached(path, time.monotonic() + RETURN_S)


def reached(path: str, deadline: float) -> _socket.socket:
    """A connection to the agent, once there is one. Raises RefusedError."""
    while True:
        try:
            return connected(path)
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, TimeoutError):
                raise RefusedError(
                    f"the agent does not answer ({error.strerror or 'it hangs'}), and has to say whether this guest waits "
                    "in its memory. See: systemctl status cpr-agent"
                ) from None
        time.sleep(LOOK_S)


def connected(path: str) -> _socket.socket:
    """Raises OSError, RefusedError."""
    agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    agent.settimeout(CONNECT_S)
    agent.connect(path)
    credentials = agent.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, CREDENTIALS_BYTES)
    uid = int.from_bytes(credentials[4:8], sys.byteorder)  # pid, uid, gid (unix(7), SO_PEERCRED)
    if uid not in (0, os.geteuid()):
        raise RefusedError(f"{path} belongs to user {uid}, and is not the agent's")
    return agent


def until_answered(agent: _socket.socket, request: bytes, deadline: float) -> None:
    """Return on a yes. Raises RefusedError, LostError."""
    said, held, piece = b"", False, ALIVE
    try:
        deliver(agent, request)
        while piece and len(said) < MAX_REASON_BYTES:
            left = max(deadline - time.monotonic(), SHORTEST_S)
            agent.settimeout(left if held else min(left, SILENCE_S))
            piece = agent.recv(MAX_REASON_BYTES)
            said = (said + piece).lstrip(ALIVE)
            if said.startswith(HELD):
                held, deadline, said = True, time.monotonic() + HELD_S, said[len(HELD) :].lstrip(ALIVE)
            if said == YES:
                return
            if not held and time.monotonic() > deadline:
                raise TimeoutError
    except TimeoutError:
        raise RefusedError("the agent has not answered in time. See: systemctl status cpr-agent") from None
    except OSError:
        raise LostError from None
    if not said:
        raise LostError
    if not said.startswith(NO):
        raise RefusedError(f"the agent gave no answer that makes sense: {said[:40]!r}")
    raise RefusedError(said[len(NO) :].decode(errors="replace"))


def deliver(agent: _socket.socket, request: bytes) -> None:
    """Raises OSError."""
    try:
        agent.sendall(request)
    except (BrokenPipeError, ConnectionResetError):
        pass  # an agent that hangs up at once has said why


if __name__ == "__main__":
    sys.exit(main(sys.argv))
