# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages as they go over the wire: what may be sent, and how much is read before anybody has looked at it.

dbus-daemon lets messages of 32 MiB through; dbus-next takes a minute to parse one, in which the agent does nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from cpr_agent.bus.library import Message, marshal, unmarshal
from cpr_agent.bus.shape import FIXED_BYTES, check, lengths
from cpr_agent.text import printable_lines

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
"""Of arguments. The longest are definitions and QEMU's command lines, of some KiB."""
MAX_MESSAGE_BYTES = 32 << 20
"""At more the bus hangs up (dbus-daemon(1), max_message_size of the system bus)."""
MAX_SENT_BYTES = 16 << 20
"""Of a message of the agent's."""
MAX_SENT_CHARS = 8 << 20
"""Of one text: the longest is a report."""
_UNREAD: list[Any] = []
"""The body of a message whose own was left out."""


class UnsendableError(ValueError):
    """A message that the bus would hang up on, or that is none."""


Fit = Callable[[str], str]
"""Makes a text fit to be sent, or raises UnsendableError: dbus-daemon hangs up at a NUL in it."""


def frame_of(message: Message, fit: Fit, max_bytes: int) -> bytearray:
    """``message`` as it goes over the wire. Raises UnsendableError."""
    message.body = sendable(message.body, fit)
    try:
        frame = marshal(message)
    except Exception as error:  # it raises what it likes
        raise UnsendableError(f"{message.interface}.{message.member} on {message.path}: {error!r}") from error
    if len(frame) > max_bytes:
        raise UnsendableError(f"{message.interface}.{message.member} on {message.path}: {len(frame)} bytes")
    return frame


def shown(text: str) -> str:
    """Printable, line by line: the agent's texts are from everywhere."""
    return printable_lines(text, MAX_SENT_CHARS)


def unchanged(text: str) -> str:
    """An argument is what the user typed, or is not sent. Raises UnsendableError."""
    if "\0" in text:
        raise UnsendableError("a text with a NUL in it can't be sent")
    return text


def sendable(value: Any, fit: Fit = shown) -> Any:
    """``value`` with every text in it fit; the same object if it is so already."""
    match value:
        case str():
            return fit(value)
        case list() | tuple():
            items = [sendable(item, fit) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        case dict():
            pairs = {sendable(key, fit): sendable(item, fit) for key, item in value.items()}
            same = all(new is old for new, old in zip(pairs.values(), value.values(), strict=False))
            return value if same and pairs.keys() == value.keys() else pairs
        case _ if hasattr(value, "signature"):  # a Variant, of either library
            inner = sendable(value.value, fit)
            return value if inner is value.value else type(value)(value.signature, inner)
        case _:
            return value


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


class FrameReader:
    """Messages from ``stream``, which does not block; each whole before the library sees it."""

    def __init__(self, stream: _Stream, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._stream = stream
        self._max_body_bytes = max_body_bytes
        self._frame = bytearray()

    def next(self) -> Message | None:
        """None if it is not all there yet. Raises EOFError, OSError."""
        while self._fill(FIXED_BYTES) and self._fill(sum(lengths(self._frame))):
            frame, self._frame = self._frame, bytearray()
            if message := parse(frame, self._max_body_bytes):
                return message
        return None

    def _fill(self, length: int) -> bool:
        while (missing := length - len(self._frame)) > 0:
            data = self._stream.read(missing)
            if data is None:
                return False
            if not data:
                raise EOFError("the bus hung up")
            self._frame += data
        return True


def parse(frame: bytearray, max_body_bytes: int = MAX_BODY_BYTES) -> Message | None:
    """``frame`` as a message: without its body, if that is too large, too deep, or makes no sense; None if the rest makes
    none."""
    header_bytes, body_bytes = lengths(frame)
    if body_bytes <= max_body_bytes and (message := _read(frame)):
        return message
    headless = frame[:header_bytes]
    headless[4:8] = bytes(4)  # the length of the body (D-Bus specification, "Message Format")
    message = _read(headless, whole=False)
    if message:
        message.body = _UNREAD
    return message


def lacks_arguments(message: Message) -> bool:
    """Were they left out by ``parse``?"""
    return message.body is _UNREAD


def _read(frame: bytearray, *, whole: bool = True) -> Message | None:
    try:
        check(frame, whole=whole)
        return unmarshal(frame)
    except Exception as error:  # the library raises what it likes
        log.warning("a message on the bus can't be read: %r", error)
        return None
