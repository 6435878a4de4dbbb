# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a frame has the shape that it claims, before a library reads it.

A bus looks, too; but over ssh the other side need not be a bus. dbus-fast counts lengths in 32 bits: one of nearly 4 GiB
leads it back into what it has read, without an end. Its 2.44 also follows values in values until the stack ends.
"""

from __future__ import annotations

import struct
from math import inf

MAX_VALUES = 1024
"""In the arguments of a call, of which the longest has some dozens of options. 64 KiB hold 30,000, which take dbus-next a
second to read."""
MAX_DEPTH = 64
"""Of values in values (D-Bus specification, "Valid Signatures": 32 arrays and 32 structures)."""
FIXED_BYTES = 16
"""Before a header's fields (D-Bus specification, "Message Format")."""
_SIZES = {"y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8, "h": 4}
_ALIGNMENTS = {**_SIZES, "s": 4, "o": 4, "g": 1, "v": 1, "a": 4, "(": 8, "{": 8}
_ENDS = {"(": ")", "{": "}"}
_SENDER_FIELD = 7
_SIGNATURE_FIELD = 8
_MOST_FIELDS = 16
"""Of a header whose sender is looked for. The specification has 9."""
_BIG_ENDIAN = ord("B")


class ShapeError(ValueError):
    """A frame that claims what it does not have."""


def lengths(frame: bytearray) -> tuple[int, int]:
    """Of the header with its padding, and of the body, by the first FIXED_BYTES of a frame."""
    order = ">" if frame[0] == _BIG_ENDIAN else "<"
    body_bytes, _, fields_bytes = struct.unpack_from(f"{order}III", frame, 4)
    return FIXED_BYTES + fields_bytes + -fields_bytes % 8, body_bytes


def sender(frame: bytearray) -> str:
    """Of a frame that came over a bus, which sets it; "" if it is not found. It costs a third of ``check_header``."""
    uint32 = struct.Struct(">I" if frame[0] == _BIG_ENDIAN else "<I").unpack_from
    at = FIXED_BYTES
    try:
        for _ in range(_MOST_FIELDS):
            at += -at % 8
            code, kind = frame[at], bytes(frame[at + 1 : at + 4])
            at += 4
            if kind == b"\1g\0":
                at += frame[at] + 2
            elif kind == b"\1u\0":
                at += 4
            elif kind in (b"\1s\0", b"\1o\0"):
                text, (size,) = at + 4, uint32(frame, at)
                if code == _SENDER_FIELD:
                    return frame[text : text + size].decode("ascii", "replace")
                at = text + size + 1
            else:
                break
    except (IndexError, struct.error):
        pass
    return ""


def check(frame: bytearray, most_values: float = inf) -> None:
    """Raises ShapeError unless the fields and the values of ``frame`` are where they should be, and no more than
    ``most_values`` of the latter are there."""
    signature = check_header(frame)
    header_bytes, body_bytes = lengths(frame)
    if header_bytes + body_bytes != len(frame):
        raise ShapeError(f"a frame of {len(frame)} bytes that should have {header_bytes + body_bytes}")
    try:
        _Walk(frame, header_bytes, len(frame), most_values).values(signature)
    except IndexError:  # a type or a byte that is not there
        raise ShapeError("a signature or a value ends too early") from None


def check_header(frame: bytearray) -> str:
    """The body's signature. Raises ShapeError unless the fields of ``frame``'s header are where they should be."""
    header_bytes, _ = lengths(frame)
    if len(frame) < header_bytes:
        raise ShapeError(f"a header of {len(frame)} bytes that should have {header_bytes}")
    try:
        return _Walk(frame, FIXED_BYTES, header_bytes).fields()
    except IndexError:
        raise ShapeError("a header ends too early") from None


class _Walk:
    """From ``at`` to ``end``, both within the frame."""

    def __init__(self, frame: bytearray, at: int, end: int, most_values: float = inf) -> None:
        self._frame, self._at, self._end = frame, at, end
        self._left = most_values
        self._length = struct.Struct(">I" if frame[0] == _BIG_ENDIAN else "<I")

    def fields(self) -> str:
        """Of a header: an array of (yv), whose length ``lengths`` has read. Returns the body's signature."""
        signature = ""
        while self._at + -self._at % 8 < self._end:
            self._take(0, 8)
            code = self._frame[self._take(1, 1)]
            kind = self._short_text()
            at = self._at
            self._one(kind, depth=1)
            if code == _SIGNATURE_FIELD and kind == "g":
                signature = self._frame[at + 1 : self._at - 1].decode("ascii", "replace")
        return signature

    def values(self, signature: str) -> None:
        at = 0
        while at < len(signature):
            at = self._value(signature, at, 0)
        if self._at != self._end:
            raise ShapeError(f"{self._end - self._at} bytes more than {signature!r} has")

    def _one(self, signature: str, depth: int) -> None:
        """A variant's value."""
        if self._value(signature, 0, depth) != len(signature):
            raise ShapeError(f"{signature!r} is not one type")

    def _value(self, signature: str, at: int, depth: int) -> int:
        """Past the value whose type is at ``at`` in ``signature``; returns where the next type is."""
        self._left -= 1
        if self._left < 0:
            raise ShapeError("it has too many values")
        kind = signature[at]
        if kind in _SIZES:
            self._take(_SIZES[kind], _SIZES[kind])
        elif kind in "so":
            self._take(self._uint32() + 1, 1)
        elif kind == "g":
            self._short_text()
        elif depth >= MAX_DEPTH:
            raise ShapeError(f"values are nested deeper than {MAX_DEPTH}")
        elif kind == "v":
            self._one(self._short_text(), depth + 1)
        elif kind == "a":
            return self._array(signature, at + 1, depth + 1)
        elif kind in _ENDS:
            at = self._structure(signature, at, depth)
        else:
            raise ShapeError(f"there is no type {kind!r}")
        return at + 1

    def _structure(self, signature: str, at: int, depth: int) -> int:
        """Returns where its last bracket is."""
        self._take(0, 8)
        end = _ENDS[signature[at]]
        at += 1
        if signature[at] == end:
            raise ShapeError("a structure of nothing")  # of which an array would have no end
        while signature[at] != end:
            at = self._value(signature, at, depth + 1)
        return at

    def _array(self, signature: str, at: int, depth: int) -> int:
        size = self._uint32()
        self._take(0, _ALIGNMENTS.get(signature[at], 1))
        stop = self._at + size
        if stop > self._end:
            raise ShapeError(f"an array of {size} bytes, of which {self._end - self._at} are there")
        after = type_end(signature, at)
        if signature[at] == "y":
            self._at = stop
        while self._at < stop:
            self._value(signature, at, depth)
        if self._at != stop:
            raise ShapeError("an array that ends within a value")
        return after

    def _uint32(self) -> int:
        return int(self._length.unpack_from(self._frame, self._take(4, 4))[0])

    def _short_text(self) -> str:
        size = self._frame[self._take(1, 1)]
        at = self._take(size + 1, 1)
        return self._frame[at : at + size].decode("ascii", "replace")

    def _take(self, size: int, alignment: int) -> int:
        at = self._at + -self._at % alignment
        self._at = at + size
        if self._at > self._end:
            raise ShapeError(f"{size} bytes, of which {self._end - at} are there")
        return at


def type_end(signature: str, at: int) -> int:
    """Where the type ends that begins at ``at``. Raises IndexError."""
    while signature[at] == "a":
        at += 1
    if signature[at] not in _ENDS:
        return at + 1
    close = _ENDS[signature[at]]
    at += 1
    while signature[at] != close:
        at = type_end(signature, at)
    return at + 1
