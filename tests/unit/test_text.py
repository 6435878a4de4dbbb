# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from elsewhere: whatever is in it, it shows, and it ends."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr_agent.text import Text, printable, printable_lines, read_text

ANY = st.text(st.characters(exclude_categories=()), max_size=300)
"""Lone surrogates, NUL and all."""


@given(ANY, st.integers(1, 100))
def test_a_line_shows_and_ends(text: str, max_chars: int) -> None:
    found = printable(text, max_chars)
    assert found.isprintable()
    assert len(found) <= max_chars
    found.encode()


@given(ANY, st.integers(1, 100))
def test_lines_keep_their_layout_alone(text: str, max_chars: int) -> None:
    found = printable_lines(text, max_chars)
    assert found.replace("\n", "").replace("\t", "").isprintable()
    assert len(found) <= max_chars


@given(ANY)
def test_what_shows_already_is_left_alone(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\0b", "a\\x00b"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\ud800", "\\ud800"),
        ("\u202eevil", "\\u202eevil"),
        ("a\r\nb", "a\\r\\nb"),
        ("größer 漢字 🙂", "größer 漢字 🙂"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_does_not_show_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_fields_of_this_type_are_made_printable_by_a_decoder() -> None:
    class Said(msgspec.Struct):
        text: Text
        more: list[Text] = []

    decoder = msgspec.json.Decoder(Said, dec_hook=read_text)
    found = decoder.decode(b'{"text": "a\\u0000", "more": ["\\u001b"]}')
    assert (found.text, found.more) == ("a\\x00", ["\\x1b"])
    assert type(found.text) is str
    assert msgspec.json.encode(found) == b'{"text":"a\\\\x00","more":["\\\\x1b"]}'
    with pytest.raises(msgspec.ValidationError, match=r"Expected `str`, got `int` - at `\$.text`"):
        decoder.decode(b'{"text": 1}')
