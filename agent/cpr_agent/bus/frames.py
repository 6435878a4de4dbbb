# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages as they go over the wire: what may be sent, and how much is read before anybody has looked at it.

dbus-daemon lets messages of 32 MiB through; dbus-next takes a minute to parse one, in which the agent does nothing else. So
a call's arguments are read once its sender may ask, and only if they are few.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

from cpr_agent.bus.library import Message, marshal, unmarshal
from cpr_agent.bus.shape import FIXED_BYTES, MAX_VALUES, check, check_header, lengths
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


class _Unread(list[Any]):
    """In the place of a body that has not been read, or can't be: then there is no ``frame``."""

    def __init__(self, signature: str, frame: bytearray | None) -> None:
        super().__init__()
        self.signature = signature
        self.frame = frame


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
    """Frames from ``stream``, which does not block."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._frame = bytearray()

    def next(self) -> bytearray | None:
        """None if it is not all there yet. Raises EOFError, OSError."""
        if not (self._fill(FIXED_BYTES) and self._fill(sum(lengths(self._frame)))):
            return None
        frame, self._frame = self._frame, bytearray()
        return frame

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
    if lengths(frame)[1] <= max_body_bytes:
        with contextlib.suppress(_UnreadableError):
            return _read(frame)
    return _head(frame, kept=None)


def parse_header(frame: bytearray) -> Message | None:
    """``frame`` as a message whose arguments wait for ``read_arguments``; None if its header makes no sense. To read a body
    takes up to a second, and its sender may not be allowed to ask at all."""
    _, body_bytes = lengths(frame)
    if not body_bytes:
        return parse(frame)
    return _head(frame, kept=frame if body_bytes <= MAX_BODY_BYTES else None)


def signature_of(message: Message) -> str:
    """Of its arguments, whether they are read or not."""
    return message.body.signature if isinstance(message.body, _Unread) else message.signature or ""


def read_arguments(message: Message) -> Message:
    """``message`` with the arguments that ``parse_header`` has left; without, if they are more than anybody can need, or
    make no sense."""
    if isinstance(message.body, _Unread) and (frame := message.body.frame) is not None:
        forget_arguments(message)
        with contextlib.suppress(_UnreadableError):
            return _read(frame, MAX_VALUES)
    return message


def forget_arguments(message: Message) -> None:
    """They take up to MAX_BODY_BYTES."""
    message.body = _Unread(signature_of(message), None)


def lacks_arguments(message: Message) -> bool:
    """Were they left out by ``parse``, or not read yet?"""
    return isinstance(message.body, _Unread)


def _head(frame: bytearray, kept: bytearray | None) -> Message | None:
    head = frame[: lengths(frame)[0]]
    head[4:8] = bytes(4)  # the length of the body (D-Bus specification, "Message Format")
    try:
        signature = check_header(head)
        message = unmarshal(head)
    except Exception as error:  # the library raises what it likes
        log.warning("a message on the bus can't be read: %r", error)
        return None
    if message:
        message.body = _Unread(signature, kept)
    return message


class _UnreadableError(Exception):
    """A frame that is no message."""


def _read(frame: bytearray, most_values: float = inf) -> Message:
    try:
        check(frame, most_values)
        if message := unmarshal(frame):
            return message
    except Exception as error:  # the library raises what it likes
        log.warning("a message on the bus can't be read: %r", error)
        raise _UnreadableError from error
    raise _UnreadableError
