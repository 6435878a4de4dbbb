# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's XML with the place of each element in its text, so that a part can be cut out and the rest stays byte by byte.

The XML is libvirt's, but whoever may define a domain has written it: it is bounded, and no entity is ever expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from cpr_agent.errors import InvalidDefinition
from cpr_agent.text import printable

MAX_BYTES = 1 << 20
"""Of a domain's XML: one with a hundred disks has a tenth of that."""
MAX_DEPTH = 64
MAX_ELEMENTS = 20_000
_DECLARATION = re.compile(rb"<!(?!--|\[CDATA\[)")
"""Of a document type, an entity, a notation. libvirt writes none, and a comment that looks like one is refused as well."""
_START_TAG = re.compile(rb"""<[^\s/>]+(?:\s+[^\s=>/]+\s*=\s*(?:"[^"]*"|'[^']*'))*\s*(/?)>""")

Element = ElementTree.Element


class Span(NamedTuple):
    """Bytes ``begin`` to ``end`` of the text are the element, those from ``begin`` to ``inside`` its start tag; for an
    ``empty`` one (``<a/>``) these are the same."""

    begin: int
    inside: int
    end: int
    empty: bool


class Edit(NamedTuple):
    """``text`` in the place of some bytes."""

    begin: int
    end: int
    text: str


class Tree(NamedTuple):
    """``root`` has names as ElementTree writes them: ``{namespace}name``."""

    text: bytes
    root: Element
    spans: dict[Element, Span]

    def start_tag(self, element: Element) -> str:
        span = self.spans[element]
        return self.text[span.begin : span.inside].decode()

    def edited(self, edits: Iterable[Edit]) -> str:
        """The text with these changes, none of which overlap."""
        out = self.text
        for edit in sorted(edits, reverse=True):
            out = out[: edit.begin] + edit.text.encode() + out[edit.end :]
        return out.decode()

    def cut(self, element: Element, text: str = "") -> Edit:
        """The element and the white space before it, away."""
        span = self.spans[element]
        return Edit(len(self.text[: span.begin].rstrip(b" \t\r\n")), span.end, text)

    def after(self, element: Element, text: str) -> Edit:
        """``text`` behind the element."""
        at = self.spans[element].end
        return Edit(at, at, text)


def parse(text: str) -> Tree:
    """Raises InvalidDefinition."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        raise InvalidDefinition(f"the domain's XML has more than {MAX_BYTES >> 10} KiB")
    if _DECLARATION.search(raw):
        raise InvalidDefinition("the domain's XML has a document type or an entity, which libvirt never writes")
    return _Reader(raw).read()


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._builder = ElementTree.TreeBuilder()
        self._open: list[tuple[Element, int, int, bool]] = []
        self._spans: dict[Element, Span] = {}
        self._count = 0
        self._parser = expat.ParserCreate("UTF-8", "}")
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._builder.data

    def read(self) -> Tree:
        try:
            self._parser.Parse(self._raw, True)  # noqa: FBT003 - expat takes no keyword
        except (expat.ExpatError, ValueError) as error:
            raise InvalidDefinition(f"the domain's XML can't be read: {printable(str(error), 200)}") from error
        return Tree(self._raw, self._builder.close(), self._spans)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if len(self._open) >= MAX_DEPTH or self._count > MAX_ELEMENTS:
            raise InvalidDefinition(f"the domain's XML is nested more than {MAX_DEPTH} deep, or has too many elements")
        begin = self._parser.CurrentByteIndex
        match = _START_TAG.match(self._raw, begin)
        if not match:
            raise InvalidDefinition("the domain's XML has a tag that libvirt would not write")
        element = self._builder.start(_name(tag), {_name(key): value for key, value in attributes.items()})
        self._open.append((element, begin, match.end(), match[1] == b"/"))

    def _end(self, tag: str) -> None:
        element, begin, inside, empty = self._open.pop()
        end = inside if empty else self._raw.index(b">", self._parser.CurrentByteIndex) + 1
        self._spans[element] = Span(begin, inside, end, empty)
        self._builder.end(_name(tag))


def _name(expanded: str) -> str:
    """Expat writes ``namespace}name`` here."""
    return "{" + expanded if "}" in expanded else expanded
