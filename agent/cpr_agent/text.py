# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from elsewhere, made fit for the bus, a terminal and a log.

QEMU, a guest, a file or a caller may put anything into a string: a NUL, at which dbus-daemon hangs up; a lone surrogate,
which is no UTF-8; an escape sequence, which a terminal obeys; a bidi mark, which makes a line read otherwise than it is.
Each such character is shown as its escape, such as ``\\x1b``, and a text ends where its limit is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

MAX_CHARS = 4096
"""The longest line: the description of a disk's node, or the text of an error with all its reasons."""
_CUT = "…"


if TYPE_CHECKING:
    Text: TypeAlias = str
else:

    class _PlainStr(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, str)

    class Text(str, metaclass=_PlainStr):
        """The type of a field that a decoder with ``read_text`` as its hook has made printable. The value is a plain
        ``str``: msgspec encodes no subclass of it."""

        __slots__ = ()


def read_text(kind: type, value: object) -> object:
    """msgspec's ``dec_hook`` for fields of type Text. Raises TypeError, which msgspec reports with the field's place."""
    if kind is not Text or not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return printable(value)


def printable(text: str, max_chars: int = MAX_CHARS) -> str:
    """One line of at most ``max_chars`` characters, all of which show."""
    if len(text) > max_chars:
        text = text[: max_chars - len(_CUT)] + _CUT
    if text.isprintable():
        return text
    return _cut("".join(char if char.isprintable() else _escape(char) for char in text), max_chars)


def printable_lines(text: str, max_chars: int) -> str:
    """The same of many lines: line feeds and tabs stay."""
    if len(text) > max_chars:
        text = text[: max_chars - len(_CUT)] + _CUT
    if text.translate(_LAYOUT).isprintable():
        return text
    return _cut("".join(char if char.isprintable() or char in "\n\t" else _escape(char) for char in text), max_chars)


_LAYOUT = {ord("\n"): None, ord("\t"): None}


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - len(_CUT)] + _CUT


def _escape(char: str) -> str:
    """As Python writes it in a string."""
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
